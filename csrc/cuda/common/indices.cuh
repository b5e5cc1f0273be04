// Indices of either integer type, checked as they are read.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/launch.cuh"
#include "interface/operands.h"

namespace sparsekern::cuda {

// The branch on the type is the same for all threads, and an index is read once for hundreds of
// products, so it is not worth a second set of kernels.
struct Indices {
  const void* data;
  IndexType type;
  int64_t n;  // valid: 0..n-1, n < 2^31

  __device__ int64_t unchecked(int64_t position) const {
    return type == kInt64 ? static_cast<const int64_t*>(data)[position]
                          : static_cast<const int32_t*>(data)[position];
  }
  // The index at a flat position, or -1 when it is not valid.
  __device__ int at(int64_t position) const {
    const int64_t index = unchecked(position);
    return index >= 0 && index < n ? static_cast<int>(index) : -1;
  }
};

// `function` is for the message.
inline Indices make_indices(const char* function, const void* data, IndexType type, int64_t n) {
  if (type != kInt64 && type != kInt32) {
    throw std::runtime_error(std::string(function) + ": there is no dtype of indices number " +
                             std::to_string(static_cast<int>(type)));
  }
  return Indices{data, type, n};
}

}  // namespace sparsekern::cuda
