// What the parts of the stand-alone checker share. See driver.cpp.
#pragma once

#include "cpu/dispatch.h"

namespace sparsekern::cpu {

// Runs top-k and codes_to_dense against a stable sort; returns the number of mismatches and adds to
// *cases.
int check_topk(const Kernels& kernels, int* cases);

// The same for adam_step, and for batch_norm and its gradient.
int check_adam(const Kernels& kernels, int* cases);
int check_batch_norm(const Kernels& kernels, int* cases);

// The same for the kernels of channel_threshold.h and of pointwise_conv.h.
int check_threshold(const Kernels& kernels, int* cases);
int check_pointwise_conv(const Kernels& kernels, int* cases);

// Has teams do things, and throw; returns the number of surprises and adds to *cases.
int check_threads(int* cases);

}  // namespace sparsekern::cpu
