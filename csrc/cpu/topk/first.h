// The largest element of a row: k = 1.
#pragma once

#include "cpu/topk/words.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Elements whose largest is found at a time. A row that is longer is read once, and of it the block
// with the largest a second time, from the cache.
constexpr int64_t kFirstBlock = 512;

// The index of the first element in the total order of x[0..n).
template <bool kAbsolute, class Stored>
inline int64_t first_of(const Stored* x, int64_t n) {
  using Lanes = typename Sum<Stored>::Lanes;
  constexpr int64_t kLanes = Sum<Stored>::kLanes;
  const Lanes none = broadcast(-std::numeric_limits<typename Sum<Stored>::Scalar>::infinity());
  Lanes best = none;  // the largest so far, in every lane
  int64_t block = 0;  // where it lies
  for (int64_t begin = 0; begin < n; begin += kFirstBlock) {
    const int64_t end = begin + kFirstBlock < n ? begin + kFirstBlock : n;
    Lanes p = none, q = none, r = none, s = none;
    NanSearch<Lanes> nan;
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      const Lanes a = compared_lanes<kAbsolute>(load(x + i));
      const Lanes b = compared_lanes<kAbsolute>(load(x + i + kLanes));
      const Lanes c = compared_lanes<kAbsolute>(load(x + i + 2 * kLanes));
      const Lanes d = compared_lanes<kAbsolute>(load(x + i + 3 * kLanes));
      nan.template see<0>(a, b);
      nan.template see<1>(c, d);
      p = larger(a, p);
      q = larger(b, q);
      r = larger(c, r);
      s = larger(d, s);
    }
    for (; i < end; i += kLanes) {
      const Lanes a = load_existing<kAbsolute>(x, i, end);
      nan.template see<2>(a, a);
      p = larger(a, p);
    }
    if (nan.found()) {
      for (i = begin; to_sum(x[i]) == to_sum(x[i]);) ++i;
      return i;
    }
    const Lanes largest = larger(larger(p, q), larger(r, s));
    if (reaching<Comparison::kGreater>(largest, best) == 0) continue;
    best = broadcast(largest_lane(largest));
    block = begin;
  }
  for (int64_t i = block;; i += kWord) {
    const uint64_t bits = compare_word<kAbsolute, Comparison::kGreaterEqual>(x, i, n, best[0]);
    if (bits != 0) return i + __builtin_ctzll(bits);
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
