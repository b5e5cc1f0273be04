// Warps, and sums over the lanes of one.
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

// The sum of x over the lanes up to this one.
template <class Int>
__device__ inline Int warp_sum_upto(Int x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Int before = __shfl_up_sync(kFullMask, x, step);
    if (static_cast<int>(threadIdx.x % kWarp) >= step) x += before;
  }
  return x;
}

}  // namespace sparsekern::cuda
