// Backward with a column-major dictionary: both gradients, tile by tile. Nothing of size [n, d]
// is allocated; the gradient of the dictionary is column-major too.
#pragma once

#include "cpu/common/buffer.h"
#include "cpu/common/parallel.h"
#include "cpu/simd/vectors.h"
#include "cpu/sparse_matmul/blocks.h"
#include "cpu/sparse_matmul/gradients.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Features in a tile: a block of 16 x 128 float32 of the dictionary and one of its gradient take
// half of a 32 KiB L1 cache.
constexpr int64_t kGradientTile = 128;
// Latents a thread owns at a time: long runs use more of each page of each feature, short ones
// divide the work more evenly. Neither changes a result.
constexpr int64_t kMostLatents = 2048;
constexpr int64_t kFewestLatents = 256;
constexpr int64_t kChunksPerThread = 4;
// Of a latent's entry or of a latent, for a feature.
constexpr double kNanosecondsPerGradient = 0.15;

// Both gradients of one block of 16 latents and one tile of features.
template <bool kDots, bool kSums, class Values, class Weight, class Scalar>
void differentiate_block(const Gradients<Values, Weight>& p, int64_t first, int64_t feature,
                         Scalar* dots) {
  alignas(kCacheLineBytes) Scalar block[kDots ? kBlockLatents * kGradientTile : 1];
  alignas(kCacheLineBytes) Scalar sums[kSums ? kBlockLatents * kGradientTile : 1];
  const int64_t latents = p.n - first < kBlockLatents ? p.n - first : kBlockLatents;
  const int64_t features = p.d - feature < kGradientTile ? p.d - feature : kGradientTile;
  const bool silent = p.offsets[first] == p.offsets[first + latents];
  if (kDots && !silent) {
    const Weight* columns = p.weight + feature * p.stride_d + first;
    prefetch_block(columns + kBlockLatents, p.stride_d, features);
    load_block(columns, p.stride_d, latents, features, block, kGradientTile);
  }
  if (kSums && (silent || latents < kBlockLatents)) std::memset(sums, 0, sizeof(sums));
  for (int64_t i = 0; i < latents && !silent; ++i) {
    const int64_t offset = i * kGradientTile;
    differentiate_entries<kDots, kSums>(p, p.offsets[first + i], p.offsets[first + i + 1], feature,
                                        features, kDots ? block + offset : block,
                                        kSums ? sums + offset : sums,
                                        [dots](int64_t place, Scalar dot) { dots[place] += dot; });
  }
  if (!kSums) return;
  Weight* out = p.grad_weight + feature * p.grad_stride_d + first;
  store_block(sums, kGradientTile, out, p.grad_stride_d, latents, features);
}

// A thread owns chunks of latents; for each it walks the tiles of features, and in each tile the
// blocks of 16 latents, transposed in the L1 cache. The dot products of a chunk's entries collect
// one partial sum per tile, in ascending order. Bound by streaming the dictionary in and its
// gradient out, one cache line of each of 128 features at a time.
template <bool kDots, bool kSums, class Values, class Weight>
void differentiate_columns(const Gradients<Values, Weight>& p, int threads) {
  using Scalar = typename Sum<Values>::Scalar;
  const int64_t entries = p.offsets[p.n];
  const Buffer<Scalar> dots(kDots ? entries : 0);
  int64_t length = p.n / (kChunksPerThread * (threads < 1 ? 1 : threads));
  length = length < kFewestLatents ? kFewestLatents : length > kMostLatents ? kMostLatents : length;
  length = length / kBlockLatents * kBlockLatents;
  const int64_t chunks = (p.n + length - 1) / length;
  const double per_feature = static_cast<double>(entries + p.n) * kNanosecondsPerGradient;
  const int team = useful_threads(threads < chunks ? threads : static_cast<int>(chunks),
                                  per_feature * static_cast<double>(p.d));
  deal_out(team, chunks, 1, [&](int64_t chunk, int) {
    const int64_t begin = chunk * length;
    const int64_t end = begin + length < p.n ? begin + length : p.n;
    for (int64_t e = p.offsets[begin]; e < p.offsets[end] && kDots; ++e) dots.get()[e] = 0;
    for (int64_t feature = 0; feature < p.d; feature += kGradientTile) {
      for (int64_t first = begin; first < end; first += kBlockLatents) {
        differentiate_block<kDots, kSums>(p, first, feature, dots.get());
      }
    }
    for (int64_t e = p.offsets[begin]; e < p.offsets[end] && kDots; ++e) {
      from_sum(dots.get()[e], p.grad_values + p.positions[e]);
    }
    fence_past_caches();
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
