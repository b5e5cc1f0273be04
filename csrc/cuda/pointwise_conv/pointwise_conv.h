// The 1x1 convolution of a tensor given as codes, and its gradients, on the GPU.
//
// dtype tags: 0 float32, 1 bfloat16, 2 float16; index tags: 0 int64, 1 int32. A code has a flat
// index into [outer, channels, inner]: it stands at the site o * inner + s, in channel c. Codes
// with an index outside contribute nothing. The weight [outputs, channels] has the dtype of the
// values, or float32, and any strides. Fewer than 2^31 codes and channels. All pointers are device
// pointers; nothing synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// Bytes of scratch that pointwise_conv needs.
int64_t pointwise_conv_workspace(int64_t count, int64_t outer, int64_t outputs, int64_t inner);

// out[o, e, s] = bias[e] + sum over the codes of site (o, s) of value * weight[e, c], summed in
// float32 in the order of the codes. The codes are grouped by ascending site, those outside last.
void pointwise_conv(const void* values,  // [count]
                    int dtype,
                    const void* indices,  // [count]
                    int index_tag, int64_t count, int64_t outer, int64_t channels, int64_t inner,
                    const void* weight, int weight_dtype, int64_t outputs, int64_t stride_outputs,
                    int64_t stride_channels,
                    const void* bias,  // null or [outputs] of weight_dtype
                    void* out,         // [outer, outputs, inner] of dtype
                    void* workspace, cudaStream_t stream);

// Bytes of scratch that pointwise_conv_backward needs.
int64_t pointwise_conv_backward_workspace(int64_t count, int64_t outer, int64_t channels,
                                          int64_t inner, int64_t outputs);

// grad_values[m] = sum over e of grad[o, e, s] * weight[e, c]
// grad_weight[e, c] = sum over the codes of channel c of value * grad[o, e, s]
// grad_bias[e] = sum over o, s of grad[o, e, s]
// The codes are grouped by ascending channel, those outside last. The same bits in every run.
void pointwise_conv_backward(const void* grad,  // [outer, outputs, inner] of dtype
                             int dtype,
                             const void* values,   // [count] of dtype
                             const void* indices,  // [count]
                             int index_tag, int64_t count, int64_t outer, int64_t channels,
                             int64_t inner, const void* weight, int weight_dtype, int64_t outputs,
                             int64_t stride_outputs, int64_t stride_channels,
                             void* grad_values,  // [count] of dtype
                             void* grad_weight,  // [outputs, channels] of weight_dtype
                             void* grad_bias,    // [outputs] of weight_dtype
                             void* workspace, cudaStream_t stream);

}  // namespace sparsekern::cuda
