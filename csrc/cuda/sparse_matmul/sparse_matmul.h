// Sparse codes times a dense dictionary, and the gradients, on the GPU.
//
// dtype tags: 0 float32, 1 bfloat16, 2 float16; index tags: 0 int64, 1 int32. Codes and dictionary
// have the same dtype, or the dictionary has float32. A weight element (i, f) lies at
// i * stride_n + f * stride_d; one of the strides is 1. All pointers are device pointers; nothing
// synchronises. Codes with an index outside 0..n-1 contribute nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// out[b, :] = bias + sum over j of values[b, j] * weight[indices[b, j], :], summed in float32.
void sparse_matmul(const void* values,  // [rows, k]
                   int dtype,
                   const void* indices,  // [rows, k]
                   int index_tag, int64_t rows, int64_t k,
                   const void* weight,  // [n, d]
                   int weight_dtype, int64_t n, int64_t d, int64_t weight_stride_n,
                   int64_t weight_stride_d,
                   const void* bias,  // null or [d] of weight_dtype
                   void* out,         // [rows, d] of dtype
                   cudaStream_t stream);

// grad_values[b, j] = grad[b, :] . weight[indices[b, j], :]
// grad_weight[i, :] = sum over the entries e = (b, j) of latent i of values[e] * grad[b, :]
// offsets and positions come from transpose_codes. The same bits in every run.
void sparse_matmul_backward(const void* grad,  // [rows, d] of dtype
                            int dtype,
                            const void* values,  // [rows, k]
                            int64_t rows, int64_t k,
                            const void* weight,  // [n, d]
                            int weight_dtype, int64_t n, int64_t d, int64_t weight_stride_n,
                            int64_t weight_stride_d,
                            const int64_t* offsets,    // [n + 1]
                            const int32_t* positions,  // [rows * k]
                            void* grad_values,         // null or [rows, k] of dtype
                            void* grad_weight,         // null or [n, d] of weight_dtype
                            int64_t grad_weight_stride_n, int64_t grad_weight_stride_d,
                            cudaStream_t stream);

}  // namespace sparsekern::cuda
