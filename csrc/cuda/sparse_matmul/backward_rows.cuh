// Backward for a row-major dictionary.
#pragma once

#include "cuda/sparse_matmul/gradients.cuh"

namespace sparsekern::cuda {

constexpr int kRowFeatures = 16;  // of a lane
constexpr int kPartFeatures = kRowFeatures * kWarp;
constexpr int kLatentsPerBlock = kMostThreads / kWarp;
// Entries read at once: 64 bytes a lane. Few latents have many entries, and warps hide latencies
// better than registers do: measured on an H200, twice as many were slower.
template <class Values>
constexpr int kRowEntries = 4 / static_cast<int>(sizeof(Values));
// Blocks of a multiprocessor that the registers must leave room for. Single numbers take more, and
// for sm_100 the compiler needs more than the 80 that three blocks leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksWithDots = 2;
#else
constexpr int kBlocksWithDots = 3;
#endif
template <bool kVector, bool kDots>
constexpr int kRowBlocks = !kVector ? 2
                           : kDots  ? kBlocksWithDots
                                    : 4;

// The parts into which d features are cut, each for a warp of its own.
inline int64_t parts_of(int64_t d) { return (d + kPartFeatures - 1) / kPartFeatures; }

// grad_weight[i, part] and the part's share of the dot products of the entries of a latent i, by a
// warp: dots[part, place of the entry in the lists], or grad_values itself where there is one part.
// Latents that are hot get zeros here, and their gradients later.
// The warp gathers the part of the upstream gradient's row of each entry, a few at a time, for both
// the sums and the dot products. All latents of a part run before those of the next one: what they
// gather, 1 KiB of a row, is 4 MiB for 4096 rows of a 16-bit dtype and stays in the L2 cache, where
// whole rows of 4096 features would not. Memory sees the dictionary and its gradient once. Nothing
// waits for other warps. On an H200 4096 rows of 64 codes, 65536 latents of 4096 features, take
// 0.76 ms in bfloat16 and 0.84 ms in float32, where memory asks for 0.25 and 0.5: bound by
// instructions and by the L2 cache, entries * d numbers.
template <class Values, class Weight, bool kVector, bool kDots>
__global__ void __launch_bounds__(kMostThreads, kRowBlocks<kVector, kDots>)
    sparse_matmul_backward_rows_kernel(Gradients<Values, Weight> p, float* dots, int64_t count) {
  using Own = Slice<Values, Weight, kVector, kRowFeatures, kWarp>;
  constexpr int kAtOnce = kRowEntries<Values>;
  const int lane = threadIdx.x % kWarp;
  const int64_t latent =
      static_cast<int64_t>(blockIdx.x) * kLatentsPerBlock + static_cast<int>(threadIdx.x) / kWarp;
  if (latent >= p.n) return;
  Own slice;
  slice.feature = static_cast<int64_t>(blockIdx.y) * kPartFeatures;
  slice.left = p.d - slice.feature < kPartFeatures ? p.d - slice.feature : kPartFeatures;
  const int left = static_cast<int>(slice.left);
  const int64_t begin = p.offsets[latent];
  const int64_t listed = p.offsets[latent + 1] - begin;
  const int total = listed > p.hot_entries ? 0 : static_cast<int>(listed);
  if constexpr (kDots) {
    slice.template load<false>(p.weight + latent * p.stride_n + slice.feature, total > 0 ? left : 0,
                               slice.weight);
  }
  slice.clear_sums();
  const Values* grad = p.grad + slice.feature;
  const bool sums = p.grad_weight != nullptr;
  const int32_t* positions = p.positions + begin;
  for (int first = 0; first < total; first += kWarp) {
    const int entries = total - first < kWarp ? total - first : kWarp;
    const int position = lane < entries ? positions[first + lane] : 0;
    const int own_row = static_cast<int>(p.row_of(position));
    // no values where only dots are wanted
    const float own_value =
        lane < entries && p.values != nullptr ? to_float(p.values[position]) : 0.0f;
    float own_dot = 0.0f;
#pragma unroll 1
    for (int base = 0; base < entries; base += kAtOnce) {
      Pack<Values, Own::kCount> x[kAtOnce][Own::kPacks];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t row = __shfl_sync(kFullMask, own_row, base + u);
        Own::template load<false>(grad + row * p.d, base + u < entries ? left : 0, x[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (base + u >= entries) break;
        const float value = __shfl_sync(kFullMask, own_value, base + u);
        if constexpr (kDots) {
          const float dot = warp_sum(sums ? slice.add(value, x[u]) : slice.dot(x[u]));
          if (lane == base + u) own_dot = dot;
        } else {
          slice.add_to_sums(value, x[u]);
        }
      }
    }
    if (kDots && lane < entries) {
      if (gridDim.y == 1) {
        from_float(own_dot, p.grad_values + position);
      } else {
        dots[blockIdx.y * count + (positions - p.positions) + first + lane] = own_dot;
      }
    }
  }
  if (sums) {
    slice.store(p.grad_weight + latent * p.grad_stride_n + slice.feature);
  }
}

// grad_values[entry] = the sum of its parts' dot products, in order. A thread per place of the
// lists; those of hot latents get nonsense, which is written over. Bound by memory: parts * 4 bytes
// an entry.
template <class Values, class Weight>
__global__ void __launch_bounds__(kMostThreads)
    sparse_matmul_backward_dots_kernel(Gradients<Values, Weight> p, const float* dots, int parts,
                                       int64_t count) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kMostThreads + threadIdx.x;
  if (place >= p.offsets[p.n]) return;
  float dot = 0.0f;
  for (int part = 0; part < parts; ++part) dot += dots[part * count + place];
  from_float(dot, p.grad_values + p.positions[place]);
}

// count: of the codes. dots: parts_of(d) * count floats, where there are several parts and
// grad_values is wanted.
template <bool kVector, class Values, class Weight>
void differentiate_rows(const Gradients<Values, Weight>& p, float* dots, int64_t count,
                        cudaStream_t stream) {
  const int parts = static_cast<int>(parts_of(p.d));
  const bool wanted = p.grad_values != nullptr;
  const auto kernel = wanted ? sparse_matmul_backward_rows_kernel<Values, Weight, kVector, true>
                             : sparse_matmul_backward_rows_kernel<Values, Weight, kVector, false>;
  launch(kernel, dim3(grid_of((p.n + kLatentsPerBlock - 1) / kLatentsPerBlock), parts),
         kMostThreads, 0, stream, p, dots, count);
  if (wanted && parts > 1) {
    launch(sparse_matmul_backward_dots_kernel<Values, Weight>,
           grid_of((count + kMostThreads - 1) / kMostThreads), kMostThreads, 0, stream, p, dots,
           parts, count);
  }
}

}  // namespace sparsekern::cuda
