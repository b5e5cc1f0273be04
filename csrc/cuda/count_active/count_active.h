// How often each latent fired, on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// counts[i] += number of entries with index i and, when values are given, a value that is not zero
// (NaN is not zero). Indices outside 0..n-1 are passed over.
void count_active(const void* indices,  // [count]
                  int index_tag,        // 0 int64, 1 int32
                  int64_t count,
                  const void* values,  // null or [count]
                  int dtype,           // 0 float32, 1 bfloat16, 2 float16
                  int64_t n,
                  int64_t* counts,  // [n]
                  cudaStream_t stream);

}  // namespace sparsekern::cuda
