// By how much an element exceeds the threshold of its channel.
#pragma once

#include "cuda/common/channels.cuh"

namespace sparsekern::cuda {

// Numbers per channel; scale and shift may be null.
struct Limits {
  const float* threshold;
  const float* scale;
  const float* shift;
};

inline Limits make_limits(const void* threshold, const void* scale, const void* shift) {
  return {static_cast<const float*>(threshold), static_cast<const float*>(scale),
          static_cast<const float*>(shift)};
}

// Those of one channel.
struct Limit {
  float threshold, scale, shift;

  __device__ bool exceeded_by(float x, float* excess) const {
    const float z = fmaf(x, scale, shift);
    *excess = z - threshold;
    return !(z <= threshold);  // holds for NaN
  }
};

__device__ inline Limit limit_of(const Limits& limits, int64_t channel) {
  return {limits.threshold[channel], limits.scale == nullptr ? 1.0f : limits.scale[channel],
          limits.shift == nullptr ? 0.0f : limits.shift[channel]};
}

}  // namespace sparsekern::cuda
