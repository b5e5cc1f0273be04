// The inner kernel of both backward passes: the entries of one latent against a range of features.
#pragma once

#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Rows of the upstream gradient read at once.
constexpr int kEntriesAtOnce = 4;

// The operands of one backward product. Null: that gradient is not wanted.
template <class Values, class Weight>
struct Gradients {
  const Values* grad;    // [rows, d]
  const Values* values;  // [rows, k]
  int64_t k;
  const Weight* weight;  // [n, d]
  int64_t n, d, stride_n, stride_d;
  const int64_t* offsets;    // [n + 1]
  const int32_t* positions;  // [rows * k]
  Values* grad_values;       // null or [rows, k]
  Weight* grad_weight;       // null or [n, d]
  int64_t grad_stride_n, grad_stride_d;
};

// For the `Count` entries e listed from `first` on, with b = e / k their rows:
//   sums[f] += values[e] * grad[b, feature + f], from 0 if `fresh`            (if kSums)
//   take(place in the list, sum over f of row[f] * grad[b, feature + f])      (if kDots)
// Each sum runs over ascending entries, each dot product over ascending vectors, so neither depends
// on how entries are grouped nor, for sums, on how features are cut.
template <int Count, bool kDots, bool kSums, class Values, class Weight, class Row, class Scalar,
          class Take>
inline void differentiate_group(const Gradients<Values, Weight>& p, int64_t first, int64_t feature,
                                int64_t width, const Row* row, Scalar* sums, bool fresh,
                                const Take& take) {
  using Lanes = typename Sum<Values>::Lanes;
  constexpr int kLanes = Sum<Values>::kLanes;
  const Values* grad[Count];
  Lanes scale[Count];
  Lanes dot[Count] = {};
  for (int j = 0; j < Count; ++j) {
    const int32_t entry = p.positions[first + j];
    const uint32_t b = static_cast<uint32_t>(entry) / static_cast<uint32_t>(p.k);
    grad[j] = p.grad + b * p.d + feature;
    scale[j] = broadcast(to_sum(p.values[entry]));
  }
  const auto step = [&](int64_t f, auto load_lanes) {
    const Lanes weight = kDots ? load_lanes(row + f) : Lanes{};
    Lanes sum = kSums && !fresh ? load_lanes(sums + f) : Lanes{};
    for (int j = 0; j < Count; ++j) {
      const Lanes g = load_lanes(grad[j] + f);
      if (kDots) dot[j] = multiply_add(weight, g, dot[j]);
      if (kSums) sum = multiply_add(scale[j], g, sum);
    }
    return sum;
  };
  int64_t f = 0;
  for (; f + kLanes <= width; f += kLanes) {
    const Lanes sum = step(f, [](auto* x) { return load(x); });
    if (kSums) store(sums + f, sum);
  }
  if (const int64_t left = width - f; left > 0) {
    const Lanes sum = step(f, [left](auto* x) { return load_partial(x, left); });
    if (kSums) store_partial(sums + f, sum, left);
  }
  for (int j = 0; j < Count && kDots; ++j) take(first + j, sum_lanes(dot[j]));
}

// The same for the entries [begin, end) of the list, a few at once. If kSums, sums[0..width) need
// no initial value: without entries they become zero.
template <bool kDots, bool kSums, class Values, class Weight, class Row, class Scalar, class Take>
inline void differentiate_entries(const Gradients<Values, Weight>& p, int64_t begin, int64_t end,
                                  int64_t feature, int64_t width, const Row* row, Scalar* sums,
                                  const Take& take) {
  if (kSums && begin == end) std::memset(sums, 0, static_cast<size_t>(width) * sizeof(Scalar));
  int64_t e = begin;
  for (; e + kEntriesAtOnce <= end; e += kEntriesAtOnce) {
    differentiate_group<kEntriesAtOnce, kDots, kSums>(p, e, feature, width, row, sums, e == begin,
                                                      take);
  }
  if ((end - e) & 2) {
    differentiate_group<2, kDots, kSums>(p, e, feature, width, row, sums, e == begin, take);
    e += 2;
  }
  if ((end - e) & 1) {
    differentiate_group<1, kDots, kSums>(p, e, feature, width, row, sums, e == begin, take);
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
