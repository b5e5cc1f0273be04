// Thresholds of channels, and what exceeds them, on the GPU.
//
// x is [outer, channels, inner], contiguous. dtype tags: 0 float32, 1 bfloat16, 2 float16. All
// pointers are device pointers; nothing synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// Bytes of scratch that channel_threshold needs.
int64_t channel_threshold_workspace(int64_t outer, int64_t channels, int64_t inner, int64_t rank,
                                    int dtype);

// thresholds[c] = the rank-th smallest of x[:, c, :], counted from 1. NaN ranks above +inf; -0
// equals +0, which is what is written. 1 <= rank <= outer * inner.
void channel_threshold(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                       int64_t rank,
                       void* thresholds,  // [channels] of dtype
                       void* workspace, cudaStream_t stream);

// With z = x * scale[c] + shift[c], in float32: y = z - threshold[c], rounded once, unless z <=
// threshold[c]; then y = 0. counts[c] += elements of the channel that are not <=.
void threshold_relu(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                    const float* threshold,  // [channels]
                    const float* scale,      // [channels], null for 1
                    const float* shift,      // [channels], null for 0
                    void* y,                 // [outer, channels, inner] of dtype
                    int64_t* counts,         // [channels]
                    cudaStream_t stream);

// Bytes of scratch that threshold_codes needs.
int64_t threshold_codes_workspace(int64_t outer, int64_t channels, int64_t inner, int dtype);

// The elements that threshold_relu counts, by ascending flat index: the first `capacity` of them
// are written, all are counted.
void threshold_codes(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                     const float* threshold, const float* scale, const float* shift,
                     int64_t capacity,
                     void* values,      // [capacity] of dtype
                     int64_t* indices,  // [capacity]
                     int64_t* counts,   // [channels], added to
                     void* workspace, cudaStream_t stream);

}  // namespace sparsekern::cuda
