// Contexts of execution that take turns on one host thread: a stack and a place to go on from.
//
// The threads of an emulated block are such contexts and not threads of the operating system: a
// barrier of 256 costs a few microseconds instead of milliseconds, a run repeats exactly, and a
// block whose threads wait for each other in vain is noticed. ThreadSanitizer follows each context
// as a thread of its own (its fibers), so it reports the same races as for real threads.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(SPARSEKERN_EMULATION_UCONTEXT)
#include <ucontext.h>
#define SPARSEKERN_SWITCH_BY_UCONTEXT 1
#endif

#if defined(__SANITIZE_THREAD__)
#define SPARSEKERN_NO_TSAN __attribute__((no_sanitize_thread, noinline))
#else
#define SPARSEKERN_NO_TSAN
#endif

namespace sparsekern::emulation {

struct Context {
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context();

  // Gives this context a stack of its own; the name appears in reports of ThreadSanitizer.
  void allocate_stack(const char* name);

  // Makes the next switch to this context call entry(), which must never return.
  void prepare(void (*entry)());

  // Takes the state of the calling host thread: what a switch away from it will come back to.
  void adopt_caller();

  void* stack = nullptr;  // the mapping, guard page included; null for an adopted context
  void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* fiber = nullptr;       // ThreadSanitizer's
#ifdef SPARSEKERN_SWITCH_BY_UCONTEXT
  ucontext_t state = {};
#else
  void* stack_pointer = nullptr;
#endif
};

// Leaves `from` (the running context) and goes on with `to`; returns when `from` is switched to.
// This orders nothing: memory that the two share must be ordered by a barrier.
void switch_context(Context& from, Context& to);

// To be called first in the entry function of a context.
void begin_context(Context& self);

// Orders everything that `abandoned` did before what the running context `host` does next.
void abandon_context(Context& host, Context& abandoned);

}  // namespace sparsekern::emulation
