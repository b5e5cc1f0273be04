// Blocks of a column-major matrix (element (i, f) at f * stride + i), transposed through registers
// so that the features of one latent lie side by side.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Latents in a block: one cache line of float32 in each feature's row, and at least one vector.
constexpr int kBlockLatents = 16;

template <class Scalar>
struct LaneNumbers;
template <>
struct LaneNumbers<float> {
  using type = int32_t __attribute__((vector_size(kLaneBytes)));
};
template <>
struct LaneNumbers<double> {
  using type = int64_t __attribute__((vector_size(kLaneBytes)));
};

// Lanes kFirst, kFirst + 1, ... of the sequence a0 b0 a1 b1 ...
template <int kFirst, class Lanes, int... kLane>
inline Lanes interleave(Lanes a, Lanes b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((kFirst + kLane) / 2 + kLane % 2 * kCount)...);
#else
  using Numbers = typename LaneNumbers<std::remove_reference_t<decltype(a[0])> >::type;
  return __builtin_shuffle(a, b, Numbers{((kFirst + kLane) / 2 + kLane % 2 * kCount)...});
#endif
}

// Transposes the square matrix of vectors x[0..L). Interleaving row r with row r + L / 2 rotates
// the bits of (row, lane) by one place, so log2(L) rounds swap row and lane.
template <class Lanes>
inline void transpose_square(Lanes* x) {
  constexpr int kCount = sizeof(Lanes) / sizeof(x[0][0]);
  constexpr auto kSequence = std::make_integer_sequence<int, kCount>{};
  Lanes y[kCount];
  for (int round = 1; round < kCount; round *= 2) {
    for (int r = 0; r < kCount / 2; ++r) {
      y[2 * r] = interleave<0>(x[r], x[r + kCount / 2], kSequence);
      y[2 * r + 1] = interleave<kCount>(x[r], x[r + kCount / 2], kSequence);
    }
    for (int r = 0; r < kCount; ++r) x[r] = y[r];
  }
}

// block[i * width + f] = matrix(i, f) for i < latents and f < features; the rest of the block of
// [kBlockLatents, width] (width: a multiple of the lanes, at least `features`) becomes zero.
template <class Stored, class Scalar>
void load_block(const Stored* matrix, int64_t stride, int64_t latents, int64_t features,
                Scalar* block, int64_t width) {
  constexpr int kLanes = Sum<Stored>::kLanes;
  using Lanes = typename Sum<Stored>::Lanes;
  for (int64_t feature = 0; feature < width; feature += kLanes) {
    for (int latent = 0; latent < kBlockLatents; latent += kLanes) {
      Lanes x[kLanes];
      const int64_t left = latents - latent;
      for (int f = 0; f < kLanes; ++f) {
        const Stored* p = matrix + (feature + f) * stride + latent;
        if (feature + f >= features || left <= 0) {
          x[f] = Lanes{};
        } else if (left >= kLanes) {
          x[f] = load(p);
        } else {
          x[f] = load_partial(p, left);
        }
      }
      transpose_square(x);
      for (int i = 0; i < kLanes; ++i) store(block + (latent + i) * width + feature, x[i]);
    }
  }
}

// matrix(i, f) = block[i * width + f] for i < latents and f < features. The lines of a block lie in
// different pages, where reading a line before overwriting it is slow: past the caches saved a
// fifth.
template <class Stored, class Scalar>
void store_block(const Scalar* block, int64_t width, Stored* matrix, int64_t stride,
                 int64_t latents, int64_t features) {
  constexpr int kLanes = Sum<Stored>::kLanes;
  using Lanes = typename Sum<Stored>::Lanes;
  for (int64_t feature = 0; feature < features; feature += kLanes) {
    for (int latent = 0; latent < latents; latent += kLanes) {
      Lanes x[kLanes];
      const int64_t left = latents - latent;
      for (int i = 0; i < kLanes; ++i) x[i] = load(block + (latent + i) * width + feature);
      transpose_square(x);
      for (int f = 0; f < kLanes && feature + f < features; ++f) {
        Stored* p = matrix + (feature + f) * stride + latent;
        if (left >= kLanes) {
          store_past_caches(p, x[f]);
        } else {
          store_partial(p, x[f], left);
        }
      }
    }
  }
}

// Fetches the lines of a block that will be loaded next.
template <class Stored>
inline void prefetch_block(const Stored* matrix, int64_t stride, int64_t features) {
  for (int64_t f = 0; f < features; ++f) __builtin_prefetch(matrix + f * stride);
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
