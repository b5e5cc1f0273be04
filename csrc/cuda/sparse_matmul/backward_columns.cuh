// Backward for a column-major dictionary (element (i, f) at f * stride + i), for example the
// transpose of the weight of a torch.nn.Linear.
#pragma once

#include "cuda/sparse_matmul/gradients.cuh"

namespace sparsekern::cuda {

// Features a thread owns: a block covers 2048 at once, of which 32 bytes' worth of latents fit in
// 65 KiB of shared memory.
constexpr int kColumnFeatures = 8;
constexpr int kSectorBytes = 32;  // what memory moves at least

// Latents of a block: those that share a sector of each feature.
template <class Weight>
constexpr int kColumnLatents = kSectorBytes / static_cast<int>(sizeof(Weight));

// Numbers from one latent to the next in a block's shared memory. Not a multiple of
// 128 bytes, so that latents lie in different banks, but whole vectors.
template <class Weight>
__host__ __device__ int tile_stride(int threads) {
  return threads * kColumnFeatures + kVectorBytes / static_cast<int>(sizeof(Weight));
}

// tile[i * stride + f] = weight[first + i, feature + f], or back into the gradient. Neighbouring
// threads move neighbouring latents of a feature: whole sectors.
template <bool kStore, class Values, class Weight>
__device__ void move_tile(const Gradients<Values, Weight>& p, int64_t first, int64_t feature,
                          Weight* tile) {
  constexpr int kSide = kColumnLatents<Weight>;
  const int stride = tile_stride<Weight>(blockDim.x);
  const int64_t width = static_cast<int64_t>(blockDim.x) * kColumnFeatures;
  const int64_t features = p.d - feature < width ? p.d - feature : width;
  const int i = threadIdx.x % kSide;
  if (first + i >= p.n) return;
#pragma unroll 4
  for (int64_t f = threadIdx.x / kSide; f < features; f += blockDim.x / kSide) {
    if (kStore) {
      p.grad_weight[(first + i) * p.grad_stride_n + (feature + f) * p.grad_stride_d] =
          tile[i * stride + f];
    } else {
      tile[i * stride + f] = p.weight[(first + i) * p.stride_n + (feature + f) * p.stride_d];
    }
  }
}

// The lists' places first .. last, all slices of the block's latents: dot products, sums, or both.
// Latents that are hot get zeros here, and their sums later.
template <class Values, class Weight, bool kVector>
__device__ void differentiate_range(const Gradients<Values, Weight>& p, int64_t first, int64_t last,
                                    bool dots, bool sums, Weight* tile, SharedEntries* shared) {
  constexpr int kLatents = kColumnLatents<Weight>;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kLatents;
  const int stride = tile_stride<Weight>(blockDim.x);
  Slice<Values, Weight, kVector, kColumnFeatures> slice;
  for (slice.feature = 0; slice.feature < p.d; slice.feature += blockDim.x * kColumnFeatures) {
    slice.left = p.d - slice.feature;
    __syncthreads();  // not needed while a thread stores the elements that it loads next
    if (dots) move_tile<false>(p, block, slice.feature, tile);
    __syncthreads();
    for (int i = 0; i < kLatents && block + i < p.n; ++i) {
      int64_t begin = p.offsets[block + i];
      int64_t end = p.offsets[block + i + 1];
      const bool hot = end - begin > p.hot_entries;
      begin = begin > first ? begin : first;
      end = hot ? begin : (end < last ? end : last);
      const int64_t left = dots && begin < end ? slice.left : 0;
      slice.template load<true>(tile + i * stride, left, slice.weight);
      slice.clear_sums();
      add_entries(p, begin, end, first, dots, &slice, shared);
      if (!sums) continue;
      slice.store(tile + i * stride);
    }
    if (sums) {
      __syncthreads();
      move_tile<true>(p, block, slice.feature, tile);
    }
  }
}

// grad_weight[i, :] and the grad_values of the entries of 16 or 8 neighbouring latents i per block,
// one after the other. The block moves its latents' dictionary rows through shared memory, so that
// it reads and writes whole sectors, gathers the upstream gradient's row of each entry, a few at a
// time, for both the sums and the dot products, and writes the gradient rows. One slice of features
// covers d = 2048; with more slices dot products wait in shared memory, and when there are more of
// them than kRange, ranges of entries take turns, and the sums follow in a walk of their own, which
// reads the upstream gradient a second time. Bound by the L2 cache's bandwidth (entries * d
// numbers), while the upstream gradient fits there.
template <class Values, class Weight, bool kVector>
__global__ void __launch_bounds__(kMostThreads, 2)
    sparse_matmul_backward_columns_kernel(Gradients<Values, Weight> p) {
  SPARSEKERN_DYNAMIC_SHARED(Weight, tile);
  __shared__ SharedEntries shared;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kColumnLatents<Weight>;
  const int64_t next = block + kColumnLatents<Weight>;
  const int64_t begin = p.offsets[block];
  const int64_t end = p.offsets[next < p.n ? next : p.n];
  const bool dots = p.grad_values != nullptr && begin < end;
  const bool sums = p.grad_weight != nullptr;
  const bool one_slice = p.d <= static_cast<int64_t>(blockDim.x) * kColumnFeatures;
  const bool together = !dots || one_slice || end - begin <= kRange;
  const int64_t ranges = together ? 1 : (end - begin + kRange - 1) / kRange;
  // After the last range, the sums by themselves when they could not be made with the dot products.
  for (int64_t i = 0; i < ranges + (!together && sums ? 1 : 0); ++i) {
    const bool all = together || i == ranges;
    const int64_t first = all ? begin : begin + i * kRange;
    const int64_t last = all || end - first < kRange ? end : first + kRange;
    differentiate_range<Values, Weight, kVector>(p, first, last, dots && i < ranges, sums && all,
                                                 tile, &shared);
  }
}

template <bool kVector, class Values, class Weight>
void differentiate_columns(const Gradients<Values, Weight>& p, cudaStream_t stream) {
  constexpr int kWarpFeatures = kWarp * kColumnFeatures;
  constexpr int kSide = kColumnLatents<Weight>;
  const int64_t warps = (p.d + kWarpFeatures - 1) / kWarpFeatures;
  const int threads = kWarp * static_cast<int>(warps < kMostWarps ? warps : kMostWarps);
  launch(sparse_matmul_backward_columns_kernel<Values, Weight, kVector>,
         grid_of((p.n + kSide - 1) / kSide), threads,
         kSide * tile_stride<Weight>(threads) * sizeof(Weight), stream, p);
}

}  // namespace sparsekern::cuda
