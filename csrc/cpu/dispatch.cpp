#include "cpu/dispatch.h"

#if defined(SPARSEKERN_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#define SPARSEKERN_ISA baseline
#include "cpu/kernels.h"
#undef SPARSEKERN_ISA
#if defined(SPARSEKERN_X86)
#define SPARSEKERN_ISA avx2
#include "cpu/kernels.h"
#undef SPARSEKERN_ISA
#define SPARSEKERN_ISA avx512
#include "cpu/kernels.h"
#undef SPARSEKERN_ISA
#endif

namespace sparsekern::cpu {

namespace {

constexpr Kernels kBaseline = {
    "baseline",
#define SPARSEKERN_KERNEL(name, ...) &baseline::name,
#define SPARSEKERN_CUDA_KERNEL(...)
#include "interface/kernels.def"
};
#if defined(SPARSEKERN_X86)
constexpr Kernels kAvx2 = {
    "avx2",
#define SPARSEKERN_KERNEL(name, ...) &avx2::name,
#define SPARSEKERN_CUDA_KERNEL(...)
#include "interface/kernels.def"
};
constexpr Kernels kAvx512 = {
    "avx512",
#define SPARSEKERN_KERNEL(name, ...) &avx512::name,
#define SPARSEKERN_CUDA_KERNEL(...)
#include "interface/kernels.def"
};
#endif

constexpr int kMaximumSets = 3;

struct Sets {
  Kernels list[kMaximumSets];
  int count = 0;

  Sets() {
#if defined(SPARSEKERN_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) list[count++] = kAvx512;
    if (avx2) list[count++] = kAvx2;
#endif
    list[count++] = kBaseline;
  }
};

const Sets& sets() {
  static const Sets found;
  return found;
}

std::atomic<int> chosen{0};

}  // namespace

const Kernels* runnable_kernels(int* count) {
  *count = sets().count;
  return sets().list;
}

const Kernels& kernels() { return sets().list[chosen.load(std::memory_order_relaxed)]; }

bool multiplies_bfloat16() {
#if defined(SPARSEKERN_X86)
  // By the instruction itself: compilers learned the names of these features late.
  constexpr unsigned kAvx512Bfloat16 = 1u << 5, kAmxBfloat16 = 1u << 22;
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f")) return false;  // which the system must have enabled
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvx512Bfloat16) != 0) return true;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBfloat16) != 0;
#else
  return false;
#endif
}

void use_instruction_set(const char* name) {
  for (int i = 0; i < sets().count; ++i) {
    if (std::strcmp(sets().list[i].instruction_set, name) == 0) {
      chosen.store(i, std::memory_order_relaxed);
      return;
    }
  }
  throw std::runtime_error(std::string("instruction set ") + name +
                           " is not in this build or not on this CPU");
}

}  // namespace sparsekern::cpu
