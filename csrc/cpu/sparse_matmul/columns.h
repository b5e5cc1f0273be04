// Forward: sparse codes times a column-major dictionary, for example the transpose of the weight of
// a torch.nn.Linear. Nothing of size [n, d] is copied.
#pragma once

#include "cpu/common/buffer.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"
#include "cpu/sparse_matmul/blocks.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Features a thread carries through all latents. A block of 16 x 64 float32 takes 4 KiB of the L1
// cache, and each entry adds four cache lines to its row of the sums.
constexpr int64_t kTileFeatures = 64;
// Rows per pass over the dictionary: their sums of one tile take 1 MiB of float32.
constexpr int64_t kRowsPerPass = 4096;
// Of a latent's entry or of a latent, for a feature.
constexpr double kNanosecondsPerFeature = 0.1;

// The operands of one forward product.
template <class Values, class Weight, class Index>
struct Product {
  const Values* values;  // [rows, k]
  const Index* indices;  // [rows, k]
  int64_t rows, k;
  const Weight* weight;  // [n, d]
  int64_t n, d, stride_n, stride_d;
  const Weight* bias;  // null or [d]
  Values* out;         // [rows, d]
};

// One pass: the entries of up to kRowsPerPass rows, listed by latent.
template <class Scalar>
struct Pass {
  struct Entry {
    int64_t row;  // within the pass
    Scalar value;
  };
  int64_t first_row, rows;
  const int64_t* offsets;  // [n + 1]
  const Entry* entries;    // [rows * k]
};

// sums[row, :] += value * weight[i, :] for the entries of the latents i of one block.
template <class Scalar>
inline void add_block(const Pass<Scalar>& pass, const Scalar* block, int64_t first, int64_t latents,
                      Scalar* sums) {
  constexpr int kLanes = Sum<Scalar>::kLanes;
  for (int64_t i = 0; i < latents; ++i) {
    const Scalar* row = block + i * kTileFeatures;
    for (int64_t e = pass.offsets[first + i]; e < pass.offsets[first + i + 1]; ++e) {
      const auto scale = broadcast(pass.entries[e].value);
      Scalar* sum = sums + pass.entries[e].row * kTileFeatures;
      for (int64_t f = 0; f < kTileFeatures; f += kLanes) {
        store(sum + f, multiply_add(scale, load(row + f), load(sum + f)));
      }
    }
  }
}

// out[rows of the pass, feature : feature + 64]. A thread owns whole tiles of features; it walks
// the latents upwards, transposes 16 of them at a time into the L1 cache and adds them to the rows
// that use them, so a sum runs over ascending latents. Bound by streaming the dictionary once, 64
// features abreast, and by the sums' traffic with the L2 cache.
template <class Values, class Weight, class Index, class Scalar>
void multiply_tile(const Product<Values, Weight, Index>& p, const Pass<Scalar>& pass,
                   int64_t feature, Scalar* sums) {
  const int64_t features = p.d - feature < kTileFeatures ? p.d - feature : kTileFeatures;
  alignas(kCacheLineBytes) Scalar block[kBlockLatents * kTileFeatures];
  Scalar start[kTileFeatures] = {};
  for (int64_t f = 0; f < features && p.bias != nullptr; ++f)
    start[f] = to_sum(p.bias[feature + f]);
  for (int64_t b = 0; b < pass.rows; ++b) {
    std::memcpy(sums + b * kTileFeatures, start, sizeof(start));
  }
  const Weight* columns = p.weight + feature * p.stride_d;
  for (int64_t first = 0; first < p.n; first += kBlockLatents) {
    const int64_t latents = p.n - first < kBlockLatents ? p.n - first : kBlockLatents;
    if (pass.offsets[first] == pass.offsets[first + latents]) continue;
    prefetch_block(columns + first + kBlockLatents, p.stride_d, features);
    load_block(columns + first, p.stride_d, latents, features, block, kTileFeatures);
    add_block(pass, block, first, latents, sums);
  }
  for (int64_t b = 0; b < pass.rows; ++b) {
    Values* out = p.out + (pass.first_row + b) * p.d + feature;
    for (int64_t f = 0; f < features; ++f) from_sum(sums[b * kTileFeatures + f], out + f);
  }
}

template <class Values, class Weight, class Index>
void multiply_columns(const Product<Values, Weight, Index>& p, int threads) {
  using Scalar = typename Sum<Values>::Scalar;
  using Entry = typename Pass<Scalar>::Entry;
  constexpr IndexType kType = sizeof(Index) == sizeof(int64_t) ? kInt64 : kInt32;
  constexpr int64_t kMostEntries = int64_t{1} << 30;  // positions are 32-bit
  int64_t most_rows = p.rows < kRowsPerPass ? p.rows : kRowsPerPass;
  if (p.k > 0 && most_rows > kMostEntries / p.k) most_rows = kMostEntries / p.k + 1;
  const int64_t tiles = (p.d + kTileFeatures - 1) / kTileFeatures;
  const double per_feature = static_cast<double>(p.rows * p.k + p.n) * kNanosecondsPerFeature;
  const int team = useful_threads(threads < tiles ? threads : static_cast<int>(tiles),
                                  per_feature * static_cast<double>(p.d));
  const Buffer<int64_t> offsets(p.n + 1);
  const Buffer<int32_t> positions(most_rows * p.k);
  const Buffer<Entry> entries(most_rows * p.k);
  const Buffer<Scalar> sums(team * most_rows * kTileFeatures);
  for (int64_t row = 0; row < p.rows; row += most_rows) {
    const int64_t rows = p.rows - row < most_rows ? p.rows - row : most_rows;
    const Values* values = p.values + row * p.k;
    const IndexList indices{p.indices + row * p.k, kType, rows * p.k};
    transpose_codes({indices, p.n, offsets.get(), positions.get()}, threads);
    share_out(team, rows * p.k, [&](int64_t e) {
      const int32_t position = positions.get()[e];
      entries.get()[e] = Entry{position / p.k, to_sum(values[position])};
    });
    const Pass<Scalar> pass{row, rows, offsets.get(), entries.get()};
    deal_out(team, tiles, 1, [&](int64_t tile, int member) {
      Scalar* own_sums = sums.get() + member * most_rows * kTileFeatures;
      multiply_tile(p, pass, tile * kTileFeatures, own_sums);
    });
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
