// A row of neighbours, read a vector or 64 elements at a time.
#pragma once

#include "cpu/order/bound.h"
#include "cpu/topk/regimes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Elements i and those after it of [0, count), as they are compared; lanes past the end are -inf.
template <bool kAbsolute, class Stored>
inline auto load_existing(const Stored* x, int64_t i, int64_t count) {
  using Lanes = typename Sum<Stored>::Lanes;
  using Integers = typename Sum<Stored>::IntegerLanes;
  using Scalar = typename Sum<Stored>::Scalar;
  if (i + Sum<Stored>::kLanes <= count) return compared_lanes<kAbsolute>(load(x + i));
  const Lanes lanes = compared_lanes<kAbsolute>(load_partial(x + i, count - i));
  const auto left = static_cast<typename Sum<Stored>::Integer>(count - i);
  const auto exists = (Integers)(lane_numbers<decltype(left)>() < broadcast(left));
  const Lanes none = broadcast(-std::numeric_limits<Scalar>::infinity());
  return (Lanes)((exists & (Integers)lanes) | (~exists & (Integers)none));
}

// One bit for each of the last elements of [0, count), fewer than a word, that reaches the bound.
// Not inlined, since its registers would be missed where whole words are compared.
template <bool kAbsolute, Comparison kHow, class Stored>
__attribute__((noinline)) uint64_t compare_last(const Stored* x, int64_t i, int64_t count,
                                                typename Sum<Stored>::Scalar bound) {
  const auto limit = broadcast(bound);
  uint64_t hits = 0;
  for (int64_t v = i; v < count; v += Sum<Stored>::kLanes) {
    hits |= uint64_t{reaching<kHow>(load_existing<kAbsolute>(x, v, count), limit)} << (v - i);
  }
  return hits & ((uint64_t{1} << (count - i)) - 1);
}

// One bit for each element of the word at i of [0, count) that reaches the bound.
template <bool kAbsolute, Comparison kHow, class Stored>
inline uint64_t compare_word(const Stored* x, int64_t i, int64_t count,
                             typename Sum<Stored>::Scalar bound) {
  if (i + kWord > count) return compare_last<kAbsolute, kHow>(x, i, count, bound);
  return compare_64<kHow>([&](int v) { return compared_lanes<kAbsolute>(load(x + i + v)); },
                          broadcast(bound));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
