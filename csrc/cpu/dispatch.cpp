#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(SPARSEKERN_X86)
#define SPARSEKERN_ISA avx2
#include "cpu/adam_step/adam_step.h"
#include "cpu/batch_norm/batch_norm.h"
#include "cpu/channel_threshold/channel_threshold.h"
#include "cpu/count_active/count_active.h"
#include "cpu/pointwise_conv/pointwise_conv.h"
#include "cpu/sparse_matmul/sparse_matmul.h"
#include "cpu/topk/topk.h"
#undef SPARSEKERN_ISA
#define SPARSEKERN_ISA avx512
#include "cpu/adam_step/adam_step.h"
#include "cpu/batch_norm/batch_norm.h"
#include "cpu/channel_threshold/channel_threshold.h"
#include "cpu/count_active/count_active.h"
#include "cpu/pointwise_conv/pointwise_conv.h"
#include "cpu/sparse_matmul/sparse_matmul.h"
#include "cpu/topk/topk.h"
#undef SPARSEKERN_ISA
#endif

namespace sparsekern::cpu {

namespace {

#define SPARSEKERN_KERNELS(isa)                                                                    \
  Kernels {                                                                                        \
    #isa, &isa::topk, &isa::codes_to_dense, &isa::sparse_matmul, &isa::transpose_codes,            \
        &isa::is_transposition, &isa::sparse_matmul_backward, &isa::count_active, &isa::adam_step, \
        &isa::channel_threshold, &isa::threshold_relu, &isa::threshold_codes,                      \
        &isa::pointwise_conv, &isa::pointwise_conv_backward, &isa::batch_norm,                     \
        &isa::batch_norm_backward                                                                  \
  }

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
    if (avx512) list[count++] = SPARSEKERN_KERNELS(avx512);
    if (avx2) list[count++] = SPARSEKERN_KERNELS(avx2);
#endif
    list[count++] = SPARSEKERN_KERNELS(baseline);
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
