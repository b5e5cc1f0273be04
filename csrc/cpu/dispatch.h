// The kernels of the best instruction set that this CPU has, chosen when first asked for.
#pragma once

#define SPARSEKERN_ISA baseline
#include "cpu/adam_step/adam_step.h"
#include "cpu/batch_norm/batch_norm.h"
#include "cpu/channel_threshold/channel_threshold.h"
#include "cpu/count_active/count_active.h"
#include "cpu/pointwise_conv/pointwise_conv.h"
#include "cpu/sparse_matmul/sparse_matmul.h"
#include "cpu/topk/topk.h"
#undef SPARSEKERN_ISA

namespace sparsekern::cpu {

struct Kernels {
  const char* instruction_set;
  decltype(&baseline::topk) topk;
  decltype(&baseline::codes_to_dense) codes_to_dense;
  decltype(&baseline::sparse_matmul) sparse_matmul;
  decltype(&baseline::transpose_codes) transpose_codes;
  decltype(&baseline::is_transposition) is_transposition;
  decltype(&baseline::sparse_matmul_backward) sparse_matmul_backward;
  decltype(&baseline::count_active) count_active;
  decltype(&baseline::adam_step) adam_step;
  decltype(&baseline::channel_threshold) channel_threshold;
  decltype(&baseline::threshold_relu) threshold_relu;
  decltype(&baseline::threshold_codes) threshold_codes;
  decltype(&baseline::pointwise_conv) pointwise_conv;
  decltype(&baseline::pointwise_conv_backward) pointwise_conv_backward;
  decltype(&baseline::batch_norm) batch_norm;
  decltype(&baseline::batch_norm_backward) batch_norm_backward;
};

// All sets that this build has and this CPU can run, best first; ends with baseline.
const Kernels* runnable_kernels(int* count);

// The set in use.
const Kernels& kernels();

// Uses another runnable set from now on (tests and benchmarks); throws when it is not there.
void use_instruction_set(const char* name);

}  // namespace sparsekern::cpu
