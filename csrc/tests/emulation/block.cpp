#include "tests/emulation/block.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/emulation/context.h"

// The scheduler's own memory is touched by all contexts with nothing to order them, as the state of
// a scheduler is. Functions that touch it are hidden from ThreadSanitizer (SPARSEKERN_NO_TSAN) and
// use plain arrays only, for functions that they call are not hidden with them.

namespace sparsekern::emulation {

Place place = {};

namespace {

enum class State { ready, in_barrier, finished };

// Lanes or threads that wait for each other. A turn is one use of the barrier. A member that leaves
// early may begin the next turn while others still read what this turn left; it cannot begin the
// turn after the next before they arrive, too. So what belongs to a turn is kept for two turns.
struct Barrier {
  unsigned live = 0;     // members that have not returned
  unsigned arrived = 0;  // of the current turn
  unsigned turn = 0;
  Together kind = Together::syncwarp;  // of the first to arrive
  Where where = {};
  int holds[2] = {};                     // predicates that hold
  std::atomic<unsigned> clock[2] = {};   // orders memory, also in the eyes of ThreadSanitizer
  uint64_t operand[2][kWarpLanes] = {};  // of a warp
  uint32_t present[2] = {};              // of a warp
};

struct Thread {
  Context context;
  Place place = {};
  State state = State::finished;
  Barrier* waits_for = nullptr;
  Together kind = Together::syncwarp;
  Where where = {};
};

enum class Failure { none, endless_wait, mismatch };

Thread* threads[max_threads] = {};
unsigned thread_count = 0;  // of the running block
unsigned current = 0;
Barrier warps[max_threads / kWarpLanes];
Barrier whole_block;
Context host;
const std::function<void()>* body = nullptr;
void* shared_memory = nullptr;
std::atomic<unsigned> started, finished;

// Threads that can go on, a ring.
unsigned ready[max_threads] = {};
unsigned ready_first = 0, ready_count = 0;

Failure failure = Failure::none;
unsigned failed_thread = 0;

SPARSEKERN_NO_TSAN void make_ready(unsigned thread) {
  threads[thread]->state = State::ready;
  ready[(ready_first + ready_count) % max_threads] = thread;
  ++ready_count;
}

// Goes on with the next thread that can, or with the host when there is none.
SPARSEKERN_NO_TSAN void give_turn(Context& from) {
  if (ready_count == 0) {
    if (whole_block.live > 0) failure = Failure::endless_wait;
    switch_context(from, host);
    return;
  }
  const unsigned next = ready[ready_first];
  ready_first = (ready_first + 1) % max_threads;
  --ready_count;
  current = next;
  place = threads[next]->place;
  switch_context(from, threads[next]->context);
}

SPARSEKERN_NO_TSAN void fail(Failure what) {
  failure = what;
  failed_thread = current;
  switch_context(threads[current]->context, host);
}

// Ends the turn: all that wait can go on.
SPARSEKERN_NO_TSAN void open(Barrier& barrier) {
  const unsigned side = barrier.turn % 2;
  const bool all = &barrier == &whole_block;
  const unsigned first = all ? 0 : current / kWarpLanes * kWarpLanes;
  const unsigned last = all ? thread_count : first + kWarpLanes;
  barrier.present[side] = 0;
  for (unsigned i = first; i < last; ++i) {
    if (threads[i]->state == State::finished) continue;
    barrier.present[side] |= 1u << (i % kWarpLanes);
    if (i != current && threads[i]->waits_for == &barrier) {
      threads[i]->waits_for = nullptr;
      make_ready(i);
    }
  }
  barrier.holds[1 - side] = 0;
  barrier.arrived = 0;
  ++barrier.turn;
}

SPARSEKERN_NO_TSAN bool matches(const Barrier& barrier, Together kind, Where where) {
  if (barrier.kind != kind) return false;
  // Lanes may meet in different lines of divergent code; the threads of a block must not.
  return &barrier != &whole_block ||
         (barrier.where.line() == where.line() && barrier.where.column() == where.column());
}

SPARSEKERN_NO_TSAN void arrive_and_wait(Barrier& barrier, Together kind, Where where) {
  Thread& self = *threads[current];
  self.kind = kind;
  self.where = where;
  if (barrier.arrived == 0) {
    barrier.kind = kind;
    barrier.where = where;
  } else if (!matches(barrier, kind, where)) {
    fail(Failure::mismatch);
  }
  if (++barrier.arrived == barrier.live) {
    self.waits_for = nullptr;
    open(barrier);
    return;
  }
  self.state = State::in_barrier;
  self.waits_for = &barrier;
  give_turn(self.context);
}

// On the hardware a thread that has returned counts as arrived wherever others wait.
SPARSEKERN_NO_TSAN void leave(Barrier& barrier) {
  --barrier.live;
  if (barrier.arrived > 0 && barrier.arrived == barrier.live) open(barrier);
}

SPARSEKERN_NO_TSAN void finish_thread() {
  Thread& self = *threads[current];
  self.state = State::finished;
  leave(warps[current / kWarpLanes]);
  leave(whole_block);
  give_turn(self.context);
}

SPARSEKERN_NO_TSAN Context& own_context() { return threads[current]->context; }

// Hidden functions that do not return to their caller leave ThreadSanitizer's idea of the stack as
// they found it; run_body is an ordinary function and returns.
void run_body() {
  started.load(std::memory_order_acquire);
  (*body)();
  finished.fetch_add(1, std::memory_order_release);
}

SPARSEKERN_NO_TSAN void thread_entry() {
  begin_context(own_context());
  run_body();
  finish_thread();
}

}  // namespace

namespace {

SPARSEKERN_NO_TSAN unsigned turn_of(const Barrier& barrier) { return barrier.turn; }

SPARSEKERN_NO_TSAN int wait_and_count(Together kind, bool predicate, Where where) {
  const unsigned side = whole_block.turn % 2;
  whole_block.holds[side] += predicate ? 1 : 0;
  arrive_and_wait(whole_block, kind, where);
  return whole_block.holds[side];
}

SPARSEKERN_NO_TSAN Barrier& own_warp() { return warps[current / kWarpLanes]; }

}  // namespace

int sync_block(Together kind, bool predicate, Where where) {
  std::atomic<unsigned>& clock = whole_block.clock[turn_of(whole_block) % 2];
  clock.fetch_add(1, std::memory_order_release);
  const int count = wait_and_count(kind, predicate, where);
  clock.load(std::memory_order_acquire);
  return count;
}

void sync_warp(Where where) {
  Barrier& warp = own_warp();
  std::atomic<unsigned>& clock = warp.clock[turn_of(warp) % 2];
  clock.fetch_add(1, std::memory_order_release);
  arrive_and_wait(warp, Together::syncwarp, where);
  clock.load(std::memory_order_acquire);
}

SPARSEKERN_NO_TSAN Operands exchange(Together kind, uint64_t mine, Where where) {
  Barrier& warp = own_warp();
  const unsigned side = warp.turn % 2, self = current % kWarpLanes;
  warp.operand[side][self] = mine;
  arrive_and_wait(warp, kind, where);
  Operands all;
  all.present = warp.present[side];
  all.self = self;
#if defined(__SANITIZE_THREAD__)
  // Volatile: as a call of memcpy this copy would be seen by ThreadSanitizer.
  const volatile uint64_t* operand = warp.operand[side];
  for (unsigned i = 0; i < kWarpLanes; ++i) all.lane[i] = operand[i];
#else
  std::memcpy(all.lane, warp.operand[side], sizeof(all.lane));
#endif
  return all;
}

void require_full_mask(unsigned mask, Where where) {
  if (mask == 0xffffffffu) return;
  std::fprintf(stderr, "emulation: a warp function with mask %#x at %s:%u; use 0xffffffff\n", mask,
               where.file_name(), static_cast<unsigned>(where.line()));
  std::abort();
}

void* dynamic_shared() { return shared_memory; }

namespace {

const char* name_of(Together kind) {
  switch (kind) {
    case Together::syncthreads:
      return "__syncthreads";
    case Together::syncthreads_count:
      return "__syncthreads_count";
    case Together::syncthreads_or:
      return "__syncthreads_or";
    case Together::syncwarp:
      return "__syncwarp";
    case Together::shuffle:
      return "a shuffle";
    case Together::vote:
      return "a vote";
    default:
      return "a reduction";
  }
}

std::string describe(unsigned thread) {
  const Thread& t = *threads[thread];
  return "thread " + std::to_string(thread) + " in " + name_of(t.kind) + " at " +
         t.where.file_name() + ":" + std::to_string(t.where.line());
}

std::string describe_failure() {
  std::string text = "emulation: ";
  text += failure == Failure::endless_wait ? "threads wait for each other for ever: "
                                           : "threads that must act together differ: ";
  if (failure == Failure::mismatch) text += describe(failed_thread) + ", ";
  // One thread for each place where some wait is enough to find the mistake.
  std::vector<unsigned> told;
  for (unsigned i = 0; i < thread_count; ++i) {
    if (threads[i]->state != State::in_barrier) continue;
    bool seen = false;
    for (unsigned other : told) {
      seen = seen || threads[other]->where.line() == threads[i]->where.line();
    }
    if (seen) continue;
    text += (told.empty() ? "" : ", ") + describe(i);
    told.push_back(i);
  }
  const Place& p = threads[failed_thread]->place;
  return text + " (block " + std::to_string(p.block.x) + ", " + std::to_string(p.block.y) + ", " +
         std::to_string(p.block.z) + ")";
}

std::vector<std::unique_ptr<Thread>>& pool() {
  static std::vector<std::unique_ptr<Thread>> all;
  return all;
}

void provide_threads(unsigned count) {
  while (pool().size() < count) {
    pool().push_back(std::make_unique<Thread>());
    const std::string name = "thread " + std::to_string(pool().size() - 1) + " of the block";
    pool().back()->context.allocate_stack(name.c_str());
    threads[pool().size() - 1] = pool().back().get();
  }
}

SPARSEKERN_NO_TSAN void reset(Barrier& barrier, unsigned live) {
  barrier.live = live;
  barrier.arrived = 0;
  barrier.turn = 0;
  barrier.holds[0] = barrier.holds[1] = 0;
}

// Puts every thread of the block before its first instruction.
SPARSEKERN_NO_TSAN void line_up(dim3 grid, dim3 block, uint3 index, bool backwards) {
  thread_count = block.x * block.y * block.z;
  reset(whole_block, thread_count);
  for (unsigned w = 0; w < thread_count / kWarpLanes; ++w) reset(warps[w], kWarpLanes);
  ready_first = ready_count = 0;
  for (unsigned step = 0; step < thread_count; ++step) {
    const unsigned i = backwards ? thread_count - 1 - step : step;
    Thread& t = *threads[i];
    t.place.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    t.place.block = index;
    t.place.block_dim = block;
    t.place.grid_dim = grid;
    t.waits_for = nullptr;
    t.context.prepare(&thread_entry);
    make_ready(i);
  }
}

void run_block(dim3 grid, dim3 block, uint3 index, size_t shared_bytes, bool backwards) {
  // A new allocation for each block, so that AddressSanitizer knows its very end, filled with bytes
  // that no kernel can mistake for something it wrote.
  const std::unique_ptr<void, decltype(&std::free)> memory(std::malloc(shared_bytes), &std::free);
  if (memory == nullptr && shared_bytes > 0) throw std::bad_alloc();
  if (shared_bytes > 0) std::memset(memory.get(), 0xCD, shared_bytes);
  shared_memory = memory.get();
  line_up(grid, block, index, backwards);
  started.fetch_add(1, std::memory_order_release);
  give_turn(host);
  finished.load(std::memory_order_acquire);
  if (failure == Failure::none) return;
  const std::string text = describe_failure();
  failure = Failure::none;
  // The stacks are in the middle of something: the next launch gets new ones.
  for (const auto& thread : pool()) abandon_context(host, thread->context);
  pool().clear();
  throw std::runtime_error(text);
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > max_threads || count % kWarpLanes != 0) {
    throw std::runtime_error("emulation: a block must have 32, 64, ... or 1024 threads, got " +
                             std::to_string(count));
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulation: a grid has at most 2^31 - 1 x 65535 x 65535 blocks");
  }
  if (shared_bytes > max_shared_bytes) {
    throw std::runtime_error("emulation: a block has at most " + std::to_string(max_shared_bytes) +
                             " bytes of shared memory, asked for " + std::to_string(shared_bytes));
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread_body) {
  static std::mutex one_launch_at_a_time;
  static unsigned launches = 0;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  check_launch(grid, block, shared_bytes);
  provide_threads(block.x * block.y * block.z);
  host.adopt_caller();
  body = &thread_body;
  // Hardware promises no order of blocks or threads: every second launch goes through both
  // backwards.
  const bool backwards = launches++ % 2 == 1;
  const uint64_t plane = uint64_t{grid.x} * grid.y, count = plane * grid.z;
  for (uint64_t step = 0; step < count; ++step) {
    const uint64_t b = backwards ? count - 1 - step : step;
    const uint3 index = {static_cast<unsigned>(b % grid.x),
                         static_cast<unsigned>(b / grid.x % grid.y),
                         static_cast<unsigned>(b / plane)};
    run_block(grid, block, index, shared_bytes, backwards);
  }
}

}  // namespace sparsekern::emulation
