// Backward with a row-major dictionary: both gradients in one pass over the latents.
// Column-major: sparse_matmul_columns_backward.cuh. Latents with many entries:
// sparse_matmul_backward_hot.cuh.
#include "cuda/dtypes.cuh"
#include "cuda/sparse_matmul.h"
#include "cuda/sparse_matmul_backward_hot.cuh"
#include "cuda/sparse_matmul_columns_backward.cuh"
#include "cuda/sparse_matmul_operands.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;
// Features a thread owns of a dictionary row: 16 sums and 16 weights in registers, and a block of
// 256 threads covers d = 4096 at once.
constexpr int kOwnFeatures = 16;
// Entries read at once: 128 bytes per thread, so two blocks of 256 threads keep 64 KB of an SM's
// loads under way, and the registers stay below the 128 that two such blocks allow.
template <class Values>
constexpr int kEntriesAtOnce = 128 / (kOwnFeatures * static_cast<int>(sizeof(Values)));
// Entries whose dot products a block collects before its warps add them up, one per lane.
constexpr int kBatch = kWarp;

// What a block shares: the entries of a batch, each warp's part of their dot products, and the dot
// products of the whole latent while d is walked in several slices.
struct Shared {
  int position[kBatch];
  int64_t row[kBatch];
  float value[kBatch];
  float part[kBatch][kMostWarps];
  float dot[kHotEntries];
};

// The features of a slice that a thread owns: kCount side by side, then a block's width further on.
template <class Values, bool kVector>
struct Features {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  static constexpr int kPacks = kOwnFeatures / kCount;

  __device__ static int64_t place(int pack, int c) {
    const int64_t thread = threadIdx.x;
    return kVector ? (pack * static_cast<int64_t>(blockDim.x) + thread) * kCount + c
                   : (pack * kCount + c) * static_cast<int64_t>(blockDim.x) + thread;
  }
  template <class T>
  __device__ static void load(const T* row, int64_t left, Pack<T, kCount> (&x)[kPacks]) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      x[pack].clear();
      if (kVector) {
        if (place(pack, 0) < left) x[pack].load(row + place(pack, 0));
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if (place(pack, c) < left) x[pack].item[c] = row[place(pack, c)];
        }
      }
    }
  }
  template <class T>
  __device__ static void store(T* row, int64_t left, const float (&sum)[kPacks][kCount]) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      Pack<T, kCount> x;
#pragma unroll
      for (int c = 0; c < kCount; ++c) from_float(sum[pack][c], &x.item[c]);
      if (kVector) {
        if (place(pack, 0) < left) x.store(row + place(pack, 0));
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if (place(pack, c) < left) row[place(pack, c)] = x.item[c];
        }
      }
    }
  }
};

// One latent's slice of features, in registers: its weights as stored and its gradient's sums.
template <class Values, class Weight, bool kVector>
struct Slice {
  using Own = Features<Values, kVector>;
  int64_t feature, left;  // where it starts, and how many features there are from there on
  Pack<Weight, Own::kCount> weight[Own::kPacks];
  float sum[Own::kPacks][Own::kCount];
};

// The batch's entries, from the place `first` of the lists on; by the first warp.
template <class Values, class Weight>
__device__ void stage_batch(const Gradients<Values, Weight>& p, int64_t first, int entries,
                            Shared* shared) {
  const int e = threadIdx.x;
  if (e >= entries) return;
  const int position = p.positions[first + e];
  shared->position[e] = position;
  shared->row[e] = position / p.k;
  shared->value[e] = to_float(p.values[position]);
}

// slice.sum += value * grad[row, slice] for the entries of the batch, in ascending order; each warp
// leaves its part of grad[row, slice] . weight in shared memory.
template <class Values, class Weight, bool kVector>
__device__ void add_batch(const Gradients<Values, Weight>& p, int entries,
                          Slice<Values, Weight, kVector>* slice, Shared* shared) {
  using Own = Features<Values, kVector>;
#pragma unroll 1
  for (int first = 0; first < entries; first += kEntriesAtOnce<Values>) {
    Pack<Values, Own::kCount> x[kEntriesAtOnce<Values>][Own::kPacks];
    float dot[kEntriesAtOnce<Values>];
#pragma unroll
    for (int u = 0; u < kEntriesAtOnce<Values>; ++u) {
      const bool here = first + u < entries;
      const int64_t row = here ? shared->row[first + u] : 0;
      Own::load(p.grad + row * p.d + slice->feature, here ? slice->left : 0, x[u]);
    }
#pragma unroll
    for (int u = 0; u < kEntriesAtOnce<Values>; ++u) {
      const float value = first + u < entries ? shared->value[first + u] : 0.0f;
      dot[u] = 0.0f;
#pragma unroll
      for (int pack = 0; pack < Own::kPacks; ++pack) {
#pragma unroll
        for (int c = 0; c < Own::kCount; ++c) {
          const float g = to_float(x[u][pack].item[c]);
          slice->sum[pack][c] = fmaf(value, g, slice->sum[pack][c]);
          dot[u] = fmaf(to_float(slice->weight[pack].item[c]), g, dot[u]);
        }
      }
    }
    if (p.grad_values == nullptr) continue;
#pragma unroll
    for (int u = 0; u < kEntriesAtOnce<Values>; ++u) {
      const float sum = warp_sum(dot[u]);
      const bool writer = threadIdx.x % kWarp == 0 && first + u < entries;
      if (writer) shared->part[first + u][threadIdx.x / kWarp] = sum;
    }
  }
}

// Adds up the warps' parts, one entry per thread of the first warp. The last slice writes.
template <class Values, class Weight>
__device__ void finish_batch(const Gradients<Values, Weight>& p, int64_t place, int entries,
                             bool first_slice, bool last_slice, Shared* shared) {
  const int e = threadIdx.x;
  if (e >= entries) return;
  float dot = first_slice ? 0.0f : shared->dot[place + e];
  for (int w = 0; w < blockDim.x / kWarp; ++w) dot += shared->part[e][w];
  if (last_slice) {
    from_float(dot, p.grad_values + shared->position[e]);
  } else {
    shared->dot[place + e] = dot;
  }
}

// grad_weight[i, :] and the grad_values of the entries of one latent i per block. The block reads
// the latent's dictionary row once into registers, gathers the upstream gradient's row of each
// entry (a few at a time) for both the sums and the dot products, and writes the gradient row once.
// Up to d = 4096 there is one slice of features; wider rows take one after the other, and dot
// products wait in shared memory. The upstream gradient stays in the L2 cache, so memory sees the
// dictionary and its gradient once. Bound by the L2 cache's bandwidth (entries * d numbers) and, for
// latents with few entries, by the latency of offsets, positions, values and rows, one after the
// other, over two or three latents per SM at a time for d = 4096.
template <class Values, class Weight, bool kVector>
__global__ void __launch_bounds__(kMostThreads, 2)
    sparse_matmul_backward_kernel(Gradients<Values, Weight> p) {
  using Own = Features<Values, kVector>;
  __shared__ Shared shared;
  const int64_t latent = blockIdx.x;
  const int64_t begin = p.offsets[latent];
  const int64_t count = p.offsets[latent + 1] - begin;
  if (count > kHotEntries) return;
  const int64_t width = static_cast<int64_t>(blockDim.x) * kOwnFeatures;
  Slice<Values, Weight, kVector> slice;
  for (slice.feature = 0; slice.feature < p.d; slice.feature += width) {
    slice.left = p.d - slice.feature;
    const bool dots = p.grad_values != nullptr && count > 0;
    Own::load(p.weight + latent * p.stride_n + slice.feature, dots ? slice.left : 0, slice.weight);
#pragma unroll
    for (int i = 0; i < kOwnFeatures; ++i) slice.sum[i / Own::kCount][i % Own::kCount] = 0.0f;
    for (int64_t place = 0; place < count; place += kBatch) {
      const int entries = count - place < kBatch ? static_cast<int>(count - place) : kBatch;
      stage_batch(p, begin + place, entries, &shared);
      __syncthreads();
      add_batch(p, entries, &slice, &shared);
      __syncthreads();
      // The first warp both finishes a batch and stages the next one.
      if (dots) {
        finish_batch(p, place, entries, slice.feature == 0, slice.left <= width, &shared);
      }
      __syncwarp();
    }
    if (p.grad_weight == nullptr) continue;
    Own::store(p.grad_weight + latent * p.grad_stride_n + slice.feature, slice.left, slice.sum);
  }
}

template <class Values, class Weight>
void differentiate_rows(const Gradients<Values, Weight>& p, cudaStream_t stream) {
  constexpr int kCount = Features<Values, true>::kCount;
  const int64_t warps = (p.d + kOwnFeatures * kWarp - 1) / (kOwnFeatures * kWarp);
  const int threads = kWarp * static_cast<int>(warps < kMostWarps ? warps : kMostWarps);
  const bool vector = packs_fit<kCount>(p.grad, p.d, p.d) &&
                      packs_fit<kCount>(p.weight, p.stride_n, p.d) &&
                      packs_fit<kCount>(p.grad_weight, p.grad_stride_n, p.d);
  const dim3 grid(grid_size(p.n));
  if (vector) {
    launch(sparse_matmul_backward_kernel<Values, Weight, true>, grid, threads, 0, stream, p);
  } else {
    launch(sparse_matmul_backward_kernel<Values, Weight, false>, grid, threads, 0, stream, p);
  }
}

template <class Values, class Weight>
void differentiate(const Gradients<Values, Weight>& p, int64_t rows, cudaStream_t stream) {
  const int64_t count = rows * p.k;
  if (p.grad_values != nullptr) {
    // Codes that are in no list, and all of them when d is 0.
    check(cudaMemsetAsync(p.grad_values, 0, static_cast<size_t>(count) * sizeof(Values), stream),
          "sparse_matmul_backward: cudaMemsetAsync");
  }
  if (p.n == 0 || p.d == 0 || (count == 0 && p.grad_weight == nullptr)) return;
  const bool rows_side_by_side = p.stride_d == 1 && (p.grad_weight == nullptr || p.grad_stride_d == 1);
  if (p.d == 1 || rows_side_by_side) {
    differentiate_rows(p, stream);
  } else {
    differentiate_columns(p, stream);
  }
  if (count > kHotEntries) differentiate_hot(p, count, stream);
}

}  // namespace

void sparse_matmul_backward(const void* grad, int dtype, const void* values, int64_t rows,
                            int64_t k, const void* weight, int weight_dtype, int64_t n, int64_t d,
                            int64_t weight_stride_n, int64_t weight_stride_d,
                            const int64_t* offsets, const int32_t* positions, void* grad_values,
                            void* grad_weight, int64_t grad_weight_stride_n,
                            int64_t grad_weight_stride_d, cudaStream_t stream) {
  visit_types(dtype, weight_dtype, [&](auto value, auto weight_value) {
    using Values = decltype(value);
    using Weight = decltype(weight_value);
    if (grad_values == nullptr && grad_weight == nullptr) return;
    const Gradients<Values, Weight> p{static_cast<const Values*>(grad),
                                      static_cast<const Values*>(values),
                                      k,
                                      static_cast<const Weight*>(weight),
                                      n,
                                      d,
                                      weight_stride_n,
                                      weight_stride_d,
                                      offsets,
                                      positions,
                                      static_cast<Values*>(grad_values),
                                      static_cast<Weight*>(grad_weight),
                                      grad_weight_stride_n,
                                      grad_weight_stride_d};
    differentiate(p, rows, stream);
  });
}

}  // namespace sparsekern::cuda
