// The transposition of codes: their flat positions, listed by latent.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// Bytes of scratch that transpose_codes needs.
int64_t transpose_workspace(int64_t count, int64_t n);

// Lists the flat positions 0..count-1 grouped by latent, ascending inside a latent: those of latent
// i are positions[offsets[i] .. offsets[i + 1]). Positions whose index lies outside 0..n-1 are left
// out; offsets[n] says how many are listed. count and n are below 2^31.
void transpose_codes(const void* indices,  // [count]
                     int index_tag,        // 0 int64, 1 int32
                     int64_t count, int64_t n,
                     int64_t* offsets,    // [n + 1]
                     int32_t* positions,  // [count]
                     void* workspace, cudaStream_t stream);

}  // namespace sparsekern::cuda
