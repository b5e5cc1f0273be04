// Backward: both gradients in one pass over the latents. Latents with many entries:
// backward_hot.cuh.
#include "cuda/common/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/sparse_matmul/backward_hot.cuh"
#include "cuda/sparse_matmul/gradients.cuh"

namespace sparsekern::cuda {

namespace {

// Features a thread owns. Row-major: a block covers d = 4096 at once. Column-major: 2048, of which
// 32 bytes' worth of latents fit in 65 KiB of shared memory.
constexpr int kRowFeatures = 16;
constexpr int kColumnFeatures = 8;
constexpr int kSectorBytes = 32;  // what memory moves at least

// Latents of a block, row-major, where there are so many: what they read first, the offsets and
// the positions, lies side by side, so that only the first latent waits for memory.
constexpr int kRowLatents = 4;
constexpr int64_t kManyLatents = 4096;
// Column-major those that share a sector of each feature.
template <class Weight>
constexpr int kColumnLatents = kSectorBytes / static_cast<int>(sizeof(Weight));

// Numbers from one latent to the next in a column-major block's shared memory. Not a multiple of
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

// The lists' places first .. last, all slices of the block's `latents`: dot products, sums, or
// both. Latents that are hot get zeros here, and their sums later.
template <class Values, class Weight, bool kVector, bool kColumns, int kOwn>
__device__ void differentiate_range(const Gradients<Values, Weight>& p, int latents, int64_t first,
                                    int64_t last, bool dots, bool sums, Weight* tile,
                                    SharedEntries* shared) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * latents;
  const int stride = tile_stride<Weight>(blockDim.x);
  Slice<Values, Weight, kVector, kOwn> slice;
  for (slice.feature = 0; slice.feature < p.d; slice.feature += blockDim.x * kOwn) {
    slice.left = p.d - slice.feature;
    if (kColumns) {
      __syncthreads();  // not needed while a thread stores the elements that it loads next
      if (dots) move_tile<false>(p, block, slice.feature, tile);
      __syncthreads();
    }
    for (int i = 0; i < latents && block + i < p.n; ++i) {
      int64_t begin = p.offsets[block + i];
      int64_t end = p.offsets[block + i + 1];
      const bool hot = end - begin > p.hot_entries;
      begin = begin > first ? begin : first;
      end = hot ? begin : (end < last ? end : last);
      const int64_t left = dots && begin < end ? slice.left : 0;
      const Weight* row =
          kColumns ? tile + i * stride : p.weight + (block + i) * p.stride_n + slice.feature;
      slice.template load<kColumns>(row, left, slice.weight);
      slice.clear_sums();
      add_entries(p, begin, end, first, dots, &slice, shared);
      if (!sums) continue;
      slice.store(kColumns ? tile + i * stride
                           : p.grad_weight + (block + i) * p.grad_stride_n + slice.feature);
    }
    if (kColumns && sums) {
      __syncthreads();
      move_tile<true>(p, block, slice.feature, tile);
    }
  }
}

// grad_weight[i, :] and the grad_values of the entries of some neighbouring latents i per block,
// one after the other (column-major 16 or 8). The block reads the latent's dictionary row into
// registers, gathers the upstream gradient's row of each entry, a few at a time, for both the sums
// and the dot products, and writes the gradient row; a column-major block moves the rows of its
// latents through shared memory, so that it reads and writes whole sectors. One slice of features
// covers d = 4096 (column-major 2048); with more slices dot products wait in shared memory, and
// when there are more of them than kRange, ranges of entries take turns, and the sums follow in a
// walk of their own, which reads the upstream gradient a second time. The upstream gradient stays
// in the L2 cache, so memory sees the dictionary and its gradient once. Bound by the L2 cache's
// bandwidth (entries * d numbers) and, for latents with few entries, by the latencies of offsets,
// positions, values and rows, one after the other, over two or three blocks per SM for d = 4096.
template <class Values, class Weight, bool kVector, bool kColumns>
__global__ void __launch_bounds__(kMostThreads, 2)
    sparse_matmul_backward_kernel(Gradients<Values, Weight> p, int latents) {
  constexpr int kOwn = kColumns ? kColumnFeatures : kRowFeatures;
  SPARSEKERN_DYNAMIC_SHARED(Weight, tile);
  __shared__ SharedEntries shared;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * latents;
  const int64_t next = block + latents;
  const int64_t begin = p.offsets[block];
  const int64_t end = p.offsets[next < p.n ? next : p.n];
  const bool dots = p.grad_values != nullptr && begin < end;
  const bool sums = p.grad_weight != nullptr;
  const bool one_slice = p.d <= static_cast<int64_t>(blockDim.x) * kOwn;
  const bool together = !dots || one_slice || end - begin <= kRange;
  const int64_t ranges = together ? 1 : (end - begin + kRange - 1) / kRange;
  // After the last range, the sums by themselves when they could not be made with the dot products.
  for (int64_t i = 0; i < ranges + (!together && sums ? 1 : 0); ++i) {
    const bool all = together || i == ranges;
    const int64_t first = all ? begin : begin + i * kRange;
    const int64_t last = all || end - first < kRange ? end : first + kRange;
    differentiate_range<Values, Weight, kVector, kColumns, kOwn>(
        p, latents, first, last, dots && i < ranges, sums && all, tile, &shared);
  }
}

template <bool kVector, bool kColumns, class Values, class Weight>
void launch_backward(const Gradients<Values, Weight>& p, cudaStream_t stream) {
  constexpr int kWarpFeatures = kWarp * (kColumns ? kColumnFeatures : kRowFeatures);
  const int latents = kColumns ? kColumnLatents<Weight> : p.n >= kManyLatents ? kRowLatents : 1;
  const int64_t warps = (p.d + kWarpFeatures - 1) / kWarpFeatures;
  const int threads = kWarp * static_cast<int>(warps < kMostWarps ? warps : kMostWarps);
  const size_t shared_bytes =
      kColumns ? latents * tile_stride<Weight>(threads) * sizeof(Weight) : 0;
  launch(sparse_matmul_backward_kernel<Values, Weight, kVector, kColumns>,
         grid_of((p.n + latents - 1) / latents), threads, shared_bytes, stream, p, latents);
}

template <class Values, class Weight>
void differentiate(const Gradients<Values, Weight>& p, int64_t count, cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  const bool columns =
      p.d > 1 && (p.stride_d != 1 || (p.grad_weight != nullptr && p.grad_stride_d != 1));
  const bool vector_grad = packs_fit<kCount>(p.grad, p.d, p.d);
  const bool vector_rows = packs_fit<kCount>(p.weight, p.stride_n, p.d) &&
                           packs_fit<kCount>(p.grad_weight, p.grad_stride_n, p.d);
  if (columns && vector_grad) {
    launch_backward<true, true>(p, stream);
  } else if (columns) {
    launch_backward<false, true>(p, stream);
  } else if (vector_grad && vector_rows) {
    launch_backward<true, false>(p, stream);
  } else {
    launch_backward<false, false>(p, stream);
  }
  if (count > p.hot_entries) differentiate_hot(p, count, stream);
}

}  // namespace

void sparse_matmul_backward(const SparseMatmulBackwardArguments& call, cudaStream_t stream) {
  const Codes& codes = call.codes;
  const Matrix &matrix = call.weight, &gradient = call.grad_weight;
  visit_dtypes("sparse_matmul_backward", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
    using Values = decltype(value);
    using Weight = decltype(weight);
    const int64_t count = codes.count();
    if (call.grad_values != nullptr && count > 0) {
      // For codes that are in no list.
      const size_t bytes = static_cast<size_t>(count) * sizeof(Values);
      check(cudaMemsetAsync(call.grad_values, 0, bytes, stream),
            "sparse_matmul_backward: cudaMemsetAsync");
    }
    const bool wanted = call.grad_values != nullptr || gradient.data != nullptr;
    if (!wanted || matrix.rows == 0 || matrix.columns == 0) return;
    const Gradients<Values, Weight> p{
        static_cast<const Values*>(call.grad),
        static_cast<const Values*>(codes.values),
        codes.k,
        static_cast<const Weight*>(matrix.data),
        matrix.rows,
        matrix.columns,
        matrix.row_stride,
        matrix.column_stride,
        call.offsets,
        call.positions,
        static_cast<Values*>(call.grad_values),
        static_cast<Weight*>(gradient.data),
        gradient.row_stride,
        gradient.column_stride,
        count / kHotPart < kHotEntries ? kHotEntries : count / kHotPart,
    };
    differentiate(p, count, stream);
  });
}

}  // namespace sparsekern::cuda
