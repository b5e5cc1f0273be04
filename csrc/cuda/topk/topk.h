// The k largest of each row, as codes or as a masked dense row.
//
// Order: value, largest first (NaN before +inf, -0 equal to +0), then index, smallest first.
// dtype tags: 0 float32, 1 bfloat16, 2 float16.
#pragma once

#include <cstdint>

#include "cuda/common/launch.cuh"

namespace sparsekern::cuda {

constexpr int kSorted = 1;  // largest first; otherwise by ascending index
constexpr int kRelu = 2;    // selected values <= 0 become 0
constexpr int kAbs = 4;     // order by magnitude

// Bytes that topk needs at `workspace` (16-byte aligned), contents arbitrary.
int64_t topk_workspace(int64_t rows, int64_t n, int64_t k, int dtype);

void topk(const void* x,  // [rows, n]
          int dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride, int64_t k,
          int flags,
          void* values,      // [rows, k] of dtype
          int64_t* indices,  // [rows, k]
          void* masked,      // null or [rows, n] of dtype
          int64_t* counts,   // null or [n], zeroed by the caller
          void* workspace, cudaStream_t stream);

// dense[b, indices[b, j]] = values[b, j], zero elsewhere. Indices are unique within a row; one
// outside 0..n-1 is left out.
void codes_to_dense(const void* values, int dtype,
                    const int64_t* indices,  // [rows, k]
                    int64_t rows, int64_t k, int64_t n,
                    void* dense,  // [rows, n] of dtype
                    cudaStream_t stream);

}  // namespace sparsekern::cuda
