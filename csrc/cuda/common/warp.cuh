// Warps, and sums over one.
#pragma once

#include "cuda/common/launch.cuh"

namespace sparsekern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The sum of x over the warp, in every lane; the same tree every time.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

}  // namespace sparsekern::cuda
