// Many codes in the order of their keys, largest first: a bitonic network over integers, in place.
//
// All comparisons put the larger item at the smaller place, so that items past the end, which are
// the smallest, stay where they are and need no memory. No branch depends on the items.
//
// The integers are compared as the numbers of float64 that have their bits: below 2^62 these are
// in the same order, none is NaN, and every instruction set has a maximum for them.
#pragma once

#include <type_traits>

#include "cpu/topk/ranking.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// ---- a key and its index in one integer ----

constexpr int kItemBits = 62;

// Integers in the order of keys and, of equal ones, indices: the key's distance from the smallest
// key above what the index leaves of the largest index. Keys of 64 bits lose their lowest bits
// where there is no room for them; then keys that differ may share theirs.
template <class Key>
class Composites {
 public:
  // Of keys from `smallest` to `largest`, and indices from 0 to n - 1.
  Composites(Key smallest, Key largest, int64_t n) : smallest_(smallest) {
    while (n > int64_t{1} << index_bits_) ++index_bits_;
    while ((distance(largest) >> lost_bits_) >> (kItemBits - index_bits_) != 0) ++lost_bits_;
  }

  int64_t of(Key key, int64_t index) const {
    return static_cast<int64_t>((distance(key) >> lost_bits_) << index_bits_) +
           (last_index() - index);
  }
  int64_t index(int64_t composite) const { return last_index() - (composite & last_index()); }
  bool exact() const { return lost_bits_ == 0; }
  bool share_key(int64_t a, int64_t b) const { return a >> index_bits_ == b >> index_bits_; }

 private:
  uint64_t distance(Key key) const {
    using Unsigned = std::make_unsigned_t<Key>;
    return static_cast<Unsigned>(static_cast<Unsigned>(key) - static_cast<Unsigned>(smallest_));
  }
  int64_t last_index() const { return (int64_t{1} << index_bits_) - 1; }

  Key smallest_;
  int index_bits_ = 0, lost_bits_ = 0;
};

// ---- exchanges: afterwards the first one is the larger ----

inline void exchange(DoubleLanes* first, DoubleLanes* second) {
  const DoubleLanes a = *first, b = *second;
  *first = larger(a, b);
  *second = smaller(a, b);
}

// Lane l of the result is lane l ^ kDistance of x.
template <int kDistance>
inline DoubleLanes swap_lanes(DoubleLanes x) {
#if defined(__clang__)
  DoubleLanes swapped;
  for (int lane = 0; lane < kDoubleLanes; ++lane) swapped[lane] = x[lane ^ kDistance];
  return swapped;
#else
  return __builtin_shuffle(x, lane_numbers<int64_t>() ^ kDistance);
#endif
}
inline DoubleLanes reverse(DoubleLanes x) { return swap_lanes<kDoubleLanes - 1>(x); }

// Lanes l and l ^ kDistance of one vector; kBit is set in the one that gets the smaller item.
template <int kDistance, int kBit>
inline DoubleLanes exchange_within(DoubleLanes x) {
  if constexpr (kBit >= kDoubleLanes) {
    return x;
  } else {
    const DoubleLanes other = swap_lanes<kDistance>(x);
#if defined(__AVX512F__)
    constexpr __mmask8 kLarger = kBit == 4 ? 0x0f : kBit == 2 ? 0x33 : 0x55;
    return _mm512_mask_max_pd(smaller(x, other), kLarger, x, other);
#else
    const LongLanes gets_smaller = (lane_numbers<int64_t>() & kBit) != 0;
    return (DoubleLanes)((gets_smaller & (LongLanes)smaller(x, other)) |
                         (~gets_smaller & (LongLanes)larger(x, other)));
#endif
  }
}
// A vector in a bitonic order, such as two ordered halves -> largest first.
inline DoubleLanes merge_within(DoubleLanes x) {
  return exchange_within<1, 1>(exchange_within<2, 2>(exchange_within<4, 4>(x)));
}
// A vector in any order -> largest first.
inline DoubleLanes sort_within(DoubleLanes x) {
  const DoubleLanes pairs = exchange_within<1, 1>(x);
  const DoubleLanes fours = exchange_within<1, 1>(exchange_within<3, 2>(pairs));
  return exchange_within<1, 1>(exchange_within<2, 2>(exchange_within<7, 4>(fours)));
}

// ---- the network ----

inline DoubleLanes load_items(const int64_t* p) { return bit_cast<DoubleLanes>(load_keys(p)); }

// Items in memory as vectors. What is stored there cannot be one of its members, since it is passed
// by value.
struct ItemVectors {
  int64_t* items;

  DoubleLanes load(int64_t vector) const { return load_items(items + vector * kDoubleLanes); }
  void store(int64_t vector, DoubleLanes x) const {
    std::memcpy(items + vector * kDoubleLanes, &x, sizeof(x));
  }
};

// The same where the last vector is partial and lies elsewhere; behind it there are as many more as
// are asked for, which are past the end and one in memory.
struct ItemVectorsToEnd {
  int64_t *items, *last;  // last: two vectors
  int64_t whole;

  DoubleLanes load(int64_t vector) const { return load_items(place(vector)); }
  void store(int64_t vector, DoubleLanes x) const { std::memcpy(place(vector), &x, sizeof(x)); }

 private:
  int64_t* place(int64_t vector) const {
    if (vector < whole) return items + vector * kDoubleLanes;
    return vector == whole ? last : last + kDoubleLanes;
  }
};

// Two ordered runs of `half` vectors, the first at `first`: the last `count` of the first run's
// items are exchanged with those at the mirrored places of the second. What is left are two bitonic
// runs.
template <class Vectors>
inline void exchange_mirrored(const Vectors vectors, int64_t first, int64_t half, int64_t count) {
  const int64_t last = first + 2 * half - 1;
  for (int64_t i = half - count; i < half; ++i) {
    DoubleLanes larger = vectors.load(first + i), smaller = reverse(vectors.load(last - i));
    exchange(&larger, &smaller);
    vectors.store(first + i, larger);
    vectors.store(last - i, reverse(smaller));
  }
}

// `distance` vectors from `first` on and as many behind them.
template <class Vectors>
inline void exchange_apart(const Vectors vectors, int64_t first, int64_t distance) {
  for (int64_t v = first; v < first + distance; ++v) {
    DoubleLanes larger = vectors.load(v), smaller = vectors.load(v + distance);
    exchange(&larger, &smaller);
    vectors.store(v, larger);
    vectors.store(v + distance, smaller);
  }
}

// The same, and then both halves, each with half the distance: four vectors at a time. With kMerge
// the distance is 2, and what is left, within vectors, is done too.
template <bool kMerge, class Vectors>
inline void exchange_twice(const Vectors vectors, int64_t first, int64_t distance) {
  const int64_t step = distance / 2;
  for (int64_t v = first; v < first + step; ++v) {
    DoubleLanes a = vectors.load(v), b = vectors.load(v + step);
    DoubleLanes c = vectors.load(v + 2 * step), d = vectors.load(v + 3 * step);
    exchange(&a, &c);
    exchange(&b, &d);
    exchange(&a, &b);
    exchange(&c, &d);
    vectors.store(v, kMerge ? merge_within(a) : a);
    vectors.store(v + step, kMerge ? merge_within(b) : b);
    vectors.store(v + 2 * step, kMerge ? merge_within(c) : c);
    vectors.store(v + 3 * step, kMerge ? merge_within(d) : d);
  }
}

// Two ordered vectors -> one ordered run.
inline void merge(DoubleLanes* larger, DoubleLanes* smaller) {
  *smaller = reverse(*smaller);
  exchange(larger, smaller);
  *larger = merge_within(*larger);
  *smaller = merge_within(*smaller);
}
// Four vectors in any order -> one ordered run.
template <class Vectors>
inline void sort_four(const Vectors vectors, int64_t first) {
  DoubleLanes a = sort_within(vectors.load(first)), b = sort_within(vectors.load(first + 1));
  DoubleLanes c = sort_within(vectors.load(first + 2)), d = sort_within(vectors.load(first + 3));
  merge(&a, &b);
  merge(&c, &d);
  c = reverse(c);
  d = reverse(d);
  exchange(&a, &d);
  exchange(&b, &c);
  exchange(&a, &b);
  exchange(&d, &c);
  vectors.store(first, merge_within(a));
  vectors.store(first + 1, merge_within(b));
  vectors.store(first + 2, merge_within(d));
  vectors.store(first + 3, merge_within(c));
}

// items[0..count) -> largest first.
inline void sort_items(int64_t* items, int64_t count) {
  const int64_t whole = count / kDoubleLanes, rest = count % kDoubleLanes;
  alignas(kLaneBytes) int64_t last[2 * kDoubleLanes];
  std::memset(last, 0, sizeof(last));
  std::memcpy(last, items + whole * kDoubleLanes, static_cast<size_t>(rest) * sizeof(*items));
  const int64_t vectors = whole + (rest > 0);
  // Calls work(vectors, first) for each block of so many, with the quicker way to them.
  const auto for_blocks = [&](int64_t block, const auto& work) {
    int64_t first = 0;
    for (; first + block <= whole; first += block) work(ItemVectors{items}, first);
    for (; first < vectors; first += block) work(ItemVectorsToEnd{items, last, whole}, first);
  };

  for_blocks(4, [](auto in, int64_t first) { sort_four(in, first); });
  for (int64_t half = 4; half < vectors; half *= 2) {
    for_blocks(2 * half, [&](auto in, int64_t first) {
      const int64_t second = vectors - first - half;  // in the second run
      if (second > 0) exchange_mirrored(in, first, half, second < half ? second : half);
    });
    int64_t distance = half / 2;
    for (; distance >= 8; distance /= 4) {
      for_blocks(2 * distance,
                 [&](auto in, int64_t first) { exchange_twice<false>(in, first, distance); });
    }
    if (distance == 4) {
      for_blocks(8, [](auto in, int64_t first) { exchange_apart(in, first, 4); });
    }
    for_blocks(4, [](auto in, int64_t first) { exchange_twice<true>(in, first, 2); });
  }
  std::memcpy(items + whole * kDoubleLanes, last, static_cast<size_t>(rest) * sizeof(*items));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
