// Backward, the part that both layouts of the dictionary share: one team of threads, one latent and
// one slice of features, with the weights and the sums of the gradient in registers.
#pragma once

#include "cuda/sparse_matmul/operands.cuh"

namespace sparsekern::cuda {

constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;
// Entries whose dot products a block collects before its warps add them up, one per lane.
constexpr int kBatch = kWarp;
// Entries whose dot products wait in shared memory while d is walked in several slices.
constexpr int kRange = 256;
// Entries read at once: 128 bytes per thread. Two blocks of 256 threads then keep 64 KB of an SM's
// loads under way, and the registers stay below the 128 that two such blocks allow.
template <class Values>
constexpr int kEntriesAtOnce = 8 / static_cast<int>(sizeof(Values));

// What a block shares: the entries of a batch, each warp's part of their dot products, and the dot
// products of a range.
struct SharedEntries {
  int position[kBatch];
  int64_t row[kBatch];
  float value[kBatch];
  float part[kBatch][kMostWarps];
  float dot[kRange];
};

// One latent's slice of features, of which each thread owns kOwn: its weights as stored and its
// gradient's sums. With vectors a thread's features lie side by side, 16 bytes of the upstream
// gradient at a time; without, those of neighbouring threads do. kTeam threads share it, or the
// block (0).
template <class Values, class Weight, bool kVector, int kOwn, int kTeam = 0>
struct Slice {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  static constexpr int kPacks = kOwn / kCount;

  int64_t feature, left;  // where it starts, and how many features there are from there on
  Pack<Weight, kCount> weight[kPacks];
  float sum[kPacks][kCount];

  __device__ static int place(int pack, int c) {
    const int threads = kTeam > 0 ? kTeam : static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x) % threads;
    return kVector ? (pack * threads + thread) * kCount + c
                   : (pack * kCount + c) * threads + thread;
  }
  // kShared: the row lies in shared memory.
  template <bool kShared, class T, class Left>
  __device__ static void load(const T* row, Left left, Pack<T, kCount> (&x)[kPacks]) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      x[pack].clear();
      if (kVector) {
        if (place(pack, 0) >= left) continue;
        if (kShared) {
          x[pack].load_shared(row + place(pack, 0));
        } else {
          x[pack].load(row + place(pack, 0));
        }
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if (place(pack, c) < left) x[pack].item[c] = row[place(pack, c)];
        }
      }
    }
  }
  __device__ void store(Weight* row) const {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      Pack<Weight, kCount> x;
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
  __device__ void clear_sums() {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[pack][c] = 0.0f;
    }
  }
  // sum += value * g.
  __device__ void add_to_sums(float value, const Pack<Values, kCount> (&x)[kPacks]) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        sum[pack][c] = fmaf(value, to_float(x[pack].item[c]), sum[pack][c]);
      }
    }
  }
  // sum += value * g; returns the thread's part of weight . g.
  __device__ float add(float value, const Pack<Values, kCount> (&x)[kPacks]) {
    float dot = 0.0f;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const float g = to_float(x[pack].item[c]);
        sum[pack][c] = fmaf(value, g, sum[pack][c]);
        dot = fmaf(to_float(weight[pack].item[c]), g, dot);
      }
    }
    return dot;
  }
  // The thread's part of weight . g.
  __device__ float dot(const Pack<Values, kCount> (&x)[kPacks]) const {
    float dot = 0.0f;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        dot = fmaf(to_float(weight[pack].item[c]), to_float(x[pack].item[c]), dot);
      }
    }
    return dot;
  }
};

// The entries first .. first + entries of the lists, one per thread of the first warp.
template <class Values, class Weight>
__device__ void stage_batch(const Gradients<Values, Weight>& p, int64_t first, int entries,
                            SharedEntries* shared) {
  const int e = threadIdx.x;
  if (e >= entries) return;
  const int position = p.positions[first + e];
  shared->position[e] = position;
  shared->row[e] = p.row_of(position);
  // null where only dots are wanted
  shared->value[e] = p.values == nullptr ? 0.0f : to_float(p.values[position]);
}

// slice.sum += value * grad[row, slice] for the entries of the batch, in ascending order; with
// `dots` each warp leaves its part of grad[row, slice] . weight in shared memory.
template <class Values, class Weight, bool kVector, int kOwn>
__device__ void add_batch(const Gradients<Values, Weight>& p, int entries, bool dots,
                          Slice<Values, Weight, kVector, kOwn>* slice, SharedEntries* shared) {
  using Own = Slice<Values, Weight, kVector, kOwn>;
  constexpr int kAtOnce = kEntriesAtOnce<Values>;
#pragma unroll 1
  for (int first = 0; first < entries; first += kAtOnce) {
    Pack<Values, Own::kCount> x[kAtOnce][Own::kPacks];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool here = first + u < entries;
      const int64_t row = here ? shared->row[first + u] : 0;
      Own::template load<false>(p.grad + row * p.d + slice->feature, here ? slice->left : 0, x[u]);
    }
    float dot[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      dot[u] = slice->add(first + u < entries ? shared->value[first + u] : 0.0f, x[u]);
    }
    if (!dots) continue;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float sum = warp_sum(dot[u]);
      const bool writes = threadIdx.x % kWarp == 0 && first + u < entries;
      if (writes) shared->part[first + u][threadIdx.x / kWarp] = sum;
    }
  }
}

// Adds up the warps' parts, one entry per thread of the first warp; `waiting` are the batch's dot
// products over the slices so far. The last slice writes them.
template <class Values, class Weight>
__device__ void finish_batch(const Gradients<Values, Weight>& p, int entries, bool first_slice,
                             bool last_slice, float* waiting, SharedEntries* shared) {
  const int e = threadIdx.x;
  if (e >= entries) return;
  float dot = first_slice ? 0.0f : waiting[e];
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) dot += shared->part[e][w];
  if (last_slice) {
    from_float(dot, p.grad_values + shared->position[e]);
  } else {
    waiting[e] = dot;
  }
}

// The entries begin .. end of one latent and one slice. `range` is the place of the first entry
// whose dot product waits in shared memory.
template <class Values, class Weight, bool kVector, int kOwn>
__device__ void add_entries(const Gradients<Values, Weight>& p, int64_t begin, int64_t end,
                            int64_t range, bool dots, Slice<Values, Weight, kVector, kOwn>* slice,
                            SharedEntries* shared) {
  const bool last_slice = slice->left <= static_cast<int64_t>(blockDim.x) * kOwn;
  for (int64_t first = begin; first < end; first += kBatch) {
    const int entries = end - first < kBatch ? static_cast<int>(end - first) : kBatch;
    stage_batch(p, first, entries, shared);
    __syncthreads();
    add_batch(p, entries, dots, slice, shared);
    __syncthreads();
    // The first warp both finishes this batch and stages the next one; nobody else reads either.
    if (dots && threadIdx.x < kWarp) {
      const bool waits = slice->feature != 0 || !last_slice;
      finish_batch(p, entries, slice->feature == 0, last_slice,
                   waits ? shared->dot + (first - range) : nullptr, shared);
    }
    __syncwarp();
  }
}

}  // namespace sparsekern::cuda
