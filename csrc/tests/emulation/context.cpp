#include "tests/emulation/context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace sparsekern::emulation {
namespace {

// Sanitizers write their reports on the stack of the faulty thread, which takes far more than a
// kernel does. Pages that are never touched cost nothing.
constexpr size_t stack_size = 512 * 1024;

// Who was left by the switch in progress: AddressSanitizer tells the bounds of its stack.
Context* left = nullptr;

void after_switch([[maybe_unused]] Context& self) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &left->stack_bytes);
  left->stack_bottom = const_cast<void*>(bottom);
#endif
}

}  // namespace

#ifndef SPARSEKERN_SWITCH_BY_UCONTEXT
// void sparsekern_switch_stack(void** save, void* load): pushes the registers that a call must
// preserve, exchanges the stack pointers, pops them again and returns on the other stack.
// (swapcontext does the same with two system calls, which makes a barrier twenty times slower.)
extern "C" void sparsekern_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden sparsekern_switch_stack
.globl sparsekern_switch_stack
.type sparsekern_switch_stack, @function
sparsekern_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sparsekern_switch_stack, .-sparsekern_switch_stack
)");
constexpr size_t saved_registers = 6;
#endif

Context::~Context() {
#if defined(__SANITIZE_THREAD__)
  if (stack != nullptr && fiber != nullptr) __tsan_destroy_fiber(fiber);
#endif
  if (stack != nullptr) munmap(stack, stack_size);
}

void Context::allocate_stack([[maybe_unused]] const char* name) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* mapping = mmap(nullptr, stack_size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  stack = mapping;
  mprotect(stack, page, PROT_NONE);  // an overflow ends the program instead of another stack
  stack_bottom = static_cast<char*>(stack) + page;
  // Tops at different offsets in their pages: at the same offset all stacks of a block would
  // compete for the same few lines of the cache.
  static size_t stacks = 0;
  stack_bytes = stack_size - page - stacks++ % 31 * 5 * 64;
#if defined(__SANITIZE_ADDRESS__)
  // What an abandoned stack at the same addresses has left in the shadow memory.
  __asan_unpoison_memory_region(stack_bottom, stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
#endif
}

void Context::prepare(void (*entry)()) {
  fake_stack = nullptr;
#ifdef SPARSEKERN_SWITCH_BY_UCONTEXT
  getcontext(&state);
  state.uc_stack.ss_sp = stack_bottom;
  state.uc_stack.ss_size = stack_bytes;
  state.uc_link = nullptr;
  makecontext(&state, entry, 0);
#else
  // What the first switch pops: the registers, then the address that its `ret` goes to. A function
  // starts with the stack pointer 8 bytes below a multiple of 16.
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack_bottom) + stack_bytes);
  uint64_t* start = top - 2;
  *start = reinterpret_cast<uint64_t>(entry);
  for (size_t i = 1; i <= saved_registers; ++i) start[-static_cast<ptrdiff_t>(i)] = 0;
  stack_pointer = start - saved_registers;
#endif
}

void Context::adopt_caller() {
#if defined(__SANITIZE_THREAD__)
  fiber = __tsan_get_current_fiber();
#endif
}

SPARSEKERN_NO_TSAN void switch_context(Context& from, [[maybe_unused]] Context& to) {
  left = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SPARSEKERN_SWITCH_BY_UCONTEXT
  swapcontext(&from.state, &to.state);
#else
  sparsekern_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  after_switch(from);
}

SPARSEKERN_NO_TSAN void abandon_context([[maybe_unused]] Context& host,
                                        [[maybe_unused]] Context& abandoned) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(abandoned.fiber, __tsan_switch_to_fiber_no_sync);
  __tsan_switch_to_fiber(host.fiber, 0);
#endif
}

void begin_context(Context& self) { after_switch(self); }

}  // namespace sparsekern::emulation
