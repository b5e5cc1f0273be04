#include "cpu/common/threads.h"

#include <atomic>
#include <exception>

#if defined(_OPENMP)
#include <pthread.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sparsekern::cpu {

namespace {

// A team costs a microsecond or two where its threads wait awake, tens of microseconds where they
// sleep, and milliseconds where another process has their core. So a second thread must save more
// than that: bench/busy.py measures both.
constexpr double kNanosecondsPerThread = 50'000;

std::atomic<double> nanoseconds_per_thread{kNanosecondsPerThread};
std::atomic<int64_t> teams{0};

// The bits of a thread's control register that flush denormal results and operands to zero.
#if defined(__SSE2__)
constexpr uint64_t kFlush = 0x8040;
uint64_t control() { return _mm_getcsr(); }
void set_control(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = uint64_t{1} << 24;
uint64_t control() {
  uint64_t bits;
  __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
void set_control(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
#else
constexpr uint64_t kFlush = 0;
uint64_t control() { return 0; }
void set_control(uint64_t) {}
#endif

#if defined(_OPENMP)
// Whether this thread is the one that a process was forked on: OpenMP would wait for the threads
// that it had before.
thread_local bool forked = false;

// When this file is loaded: torch may start OpenMP's threads before we do.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int useful_threads(int threads, double nanoseconds) {
  const double deserved = nanoseconds / nanoseconds_per_thread.load(std::memory_order_relaxed);
  if (threads <= 1 || deserved < 2) return 1;
  return deserved < threads ? static_cast<int>(deserved) : threads;
}

void run_team(int team, Member run, const void* body) {
#if defined(_OPENMP)
  if (team > 1 && !forked) {
    teams.fetch_add(1, std::memory_order_relaxed);
    const uint64_t mode = control() & kFlush;
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(team) schedule(static, 1)
    for (int member = 0; member < team; ++member) {
      const uint64_t before = control();
      set_control((before & ~kFlush) | mode);
      try {
        if (!failed.load(std::memory_order_relaxed)) run(body, member);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
      set_control(before);
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  for (int member = 0; member < team; ++member) run(body, member);
}

int64_t started_teams() { return teams.load(std::memory_order_relaxed); }

double set_nanoseconds_per_thread(double nanoseconds) {
  return nanoseconds_per_thread.exchange(nanoseconds);
}

KeepDenormals::KeepDenormals() : before_(control()) {
  if ((before_ & kFlush) != 0) set_control(before_ & ~kFlush);
}

KeepDenormals::~KeepDenormals() {
  if ((before_ & kFlush) != 0) set_control(before_);
}

}  // namespace sparsekern::cpu
