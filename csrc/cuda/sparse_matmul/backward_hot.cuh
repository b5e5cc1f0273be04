// Backward for latents with many entries, which one block would take too long for: all blocks share
// the work of each. Either layout of the dictionary.
#pragma once

#include "cuda/sparse_matmul/gradients.cuh"

namespace sparsekern::cuda {

// A latent is hot above this many entries, and above this part of all of them: a block takes about
// 0.1 microseconds per entry of 4096 features, so no block runs much longer than the whole pass;
// and there are never so many hot latents that taking them one after the other costs more.
constexpr int64_t kHotEntries = 512;
constexpr int64_t kHotPart = 256;
constexpr int kHotThreads = 256;
constexpr int kHotWarps = kHotThreads / kWarp;
constexpr int64_t kHotBlocks = 256;  // about two per SM of the largest GPUs
// Features of the dictionary row in shared memory at a time: 16 KiB of float.
constexpr int kHotStage = 4096;
constexpr int kHotEntriesPerWarp = 4;  // entries whose rows a warp reads at once
// Features a block sums at a time: 64 bytes of a 16-bit gradient row, and for d = 4096 there are
// 128 slices for the blocks to share.
constexpr int kHotSlice = 32;

// kCount features of a row: side by side at lane * kCount, or one every `lanes`.
template <bool kVector, int kCount, class Values>
__device__ Pack<Values, kCount> load_features(const Values* row, int lane, int lanes,
                                              int64_t left) {
  Pack<Values, kCount> x;
  x.clear();
  if (kVector) {
    if (lane * kCount < left) x.load(row + lane * kCount);
  } else {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (c * lanes + lane < left) x.item[c] = row[c * lanes + lane];
    }
  }
  return x;
}

// dot[u] += grad[row of entry u, feature ..] . stage for up to four entries of the warp.
template <bool kVector, class Values, class Weight>
__device__ void add_hot_dots(const Gradients<Values, Weight>& p,
                             const int (&position)[kHotEntriesPerWarp], int64_t feature,
                             const float* stage, float (&dot)[kHotEntriesPerWarp]) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  const int lane = threadIdx.x % kWarp;
  const int64_t left = p.d - feature < kHotStage ? p.d - feature : kHotStage;
#pragma unroll 1
  for (int64_t f = 0; f < left; f += kCount * kWarp) {
    Pack<Values, kCount> x[kHotEntriesPerWarp];
#pragma unroll
    for (int u = 0; u < kHotEntriesPerWarp; ++u) {
      const int64_t row = position[u] < 0 ? 0 : p.row_of(position[u]);
      x[u] = load_features<kVector, kCount>(p.grad + row * p.d + feature + f, lane, kWarp,
                                            position[u] < 0 ? 0 : left - f);
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int64_t place = f + (kVector ? lane * kCount + c : c * kWarp + lane);
      const float w = place < left ? stage[place] : 0.0f;
#pragma unroll
      for (int u = 0; u < kHotEntriesPerWarp; ++u) dot[u] = fmaf(w, to_float(x[u].item[c]), dot[u]);
    }
  }
}

// grad_values of the block's share of the latent's entries, four per warp at a time.
template <bool kVector, class Values, class Weight>
__device__ void differentiate_hot_values(const Gradients<Values, Weight>& p, int64_t latent,
                                         int64_t begin, int64_t count, float* stage) {
  const int64_t last = begin + count * (blockIdx.x + 1) / gridDim.x;
  for (int64_t first = begin + count * blockIdx.x / gridDim.x; first < last;
       first += kHotWarps * kHotEntriesPerWarp) {
    int position[kHotEntriesPerWarp];
    float dot[kHotEntriesPerWarp];
    const int64_t own = first + threadIdx.x / kWarp * kHotEntriesPerWarp;
#pragma unroll
    for (int u = 0; u < kHotEntriesPerWarp; ++u) {
      position[u] = own + u < last ? p.positions[own + u] : -1;
      dot[u] = 0.0f;
    }
    for (int64_t feature = 0; feature < p.d; feature += kHotStage) {
      __syncthreads();
      for (int64_t f = threadIdx.x; f < kHotStage && feature + f < p.d; f += kHotThreads) {
        stage[f] = to_float(p.weight[latent * p.stride_n + (feature + f) * p.stride_d]);
      }
      __syncthreads();
      add_hot_dots<kVector>(p, position, feature, stage, dot);
    }
#pragma unroll
    for (int u = 0; u < kHotEntriesPerWarp; ++u) {
      const float sum = warp_sum(dot[u]);
      if (threadIdx.x % kWarp == 0 && position[u] >= 0)
        from_float(sum, p.grad_values + position[u]);
    }
  }
}

// grad_weight of the block's slices of kHotSlice features. A group of lanes owns a slice's features
// of every (groups in the block)-th entry; their sums are added in a fixed order at the end.
template <bool kVector, class Values, class Weight>
__device__ void differentiate_hot_weight(const Gradients<Values, Weight>& p, int64_t latent,
                                         int64_t begin, int64_t count, float* stage) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  constexpr int kLanes = kHotSlice / kCount;     // lanes of a group
  constexpr int kGroups = kHotThreads / kLanes;  // groups in the block
  const int lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  for (int64_t feature = static_cast<int64_t>(blockIdx.x) * kHotSlice; feature < p.d;
       feature += static_cast<int64_t>(gridDim.x) * kHotSlice) {
    const int64_t left = p.d - feature < kHotSlice ? p.d - feature : kHotSlice;
    float sum[kCount] = {};
#pragma unroll 4
    for (int64_t e = group; e < count; e += kGroups) {
      const int position = p.positions[begin + e];
      const float value = to_float(p.values[position]);
      const Values* row = p.grad + p.row_of(position) * p.d + feature;
      const Pack<Values, kCount> x = load_features<kVector, kCount>(row, lane, kLanes, left);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[c] = fmaf(value, to_float(x.item[c]), sum[c]);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int place = kVector ? lane * kCount + c : c * kLanes + lane;
      stage[group * kHotSlice + place] = sum[c];
    }
    __syncthreads();
    if (threadIdx.x < left) {
      float total = 0.0f;
      for (int g = 0; g < kGroups; ++g) total += stage[g * kHotSlice + threadIdx.x];
      const int64_t f = feature + threadIdx.x;
      from_float(total, p.grad_weight + latent * p.grad_stride_n + f * p.grad_stride_d);
    }
  }
}

// The latent whose list covers this place: the last one that begins at or before it.
__device__ inline int64_t find_latent(const int64_t* offsets, int64_t n, int64_t place) {
  int64_t low = 0;
  int64_t high = n - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= place) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Both gradients of all latents with more than hot_entries entries, one after the other, each
// shared by all blocks: the entries for the dot products, the features for the sums. Each block
// finds these latents for itself: such a list covers a multiple of hot_entries, so it looks which
// latents own those places (about 10 microseconds when there is nothing to do). Then bound by the
// L2 cache's bandwidth, 2 * entries * d numbers.
template <bool kVector, class Values, class Weight>
__global__ void __launch_bounds__(kHotThreads, 2)
    sparse_matmul_backward_hot_kernel(Gradients<Values, Weight> p) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  static_assert(kHotStage >= kHotThreads / (kHotSlice / kCount) * kHotSlice, "room for the sums");
  __shared__ float stage[kHotStage];
  __shared__ int found[kHotThreads];
  const int64_t listed = p.offsets[p.n];
  for (int64_t first = 0; first < listed; first += kHotThreads * p.hot_entries) {
    const int64_t place = first + threadIdx.x * p.hot_entries;
    int latent = -1;
    if (place < listed) {
      const int64_t owner = find_latent(p.offsets, p.n, place);
      const int64_t begin = p.offsets[owner];
      const bool hot = p.offsets[owner + 1] - begin > p.hot_entries;
      // Only the first multiple in a list reports it.
      if (hot && place - begin < p.hot_entries) latent = static_cast<int>(owner);
    }
    found[threadIdx.x] = latent;
    if (__syncthreads_or(latent >= 0)) {
      for (int i = 0; i < kHotThreads; ++i) {
        const int64_t own = found[i];
        if (own < 0) continue;
        const int64_t begin = p.offsets[own];
        const int64_t count = p.offsets[own + 1] - begin;
        if (p.grad_values != nullptr) {
          differentiate_hot_values<kVector>(p, own, begin, count, stage);
        }
        if (p.grad_weight != nullptr) {
          differentiate_hot_weight<kVector>(p, own, begin, count, stage);
        }
      }
    }
    __syncthreads();
  }
}

template <class Values, class Weight>
void differentiate_hot(const Gradients<Values, Weight>& p, int64_t count, cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  const int64_t wanted = count / kHotEntries;
  const dim3 grid(static_cast<unsigned>(wanted < kHotBlocks ? wanted : kHotBlocks));
  if (packs_fit<kCount>(p.grad, p.d, p.d)) {
    launch(sparse_matmul_backward_hot_kernel<true, Values, Weight>, grid, kHotThreads, 0, stream,
           p);
  } else {
    launch(sparse_matmul_backward_hot_kernel<false, Values, Weight>, grid, kHotThreads, 0, stream,
           p);
  }
}

}  // namespace sparsekern::cuda
