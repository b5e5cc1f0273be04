// Codes in the order of their keys, largest first.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/order/bound.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Up to this k every pair is compared to rank a row: k^2 / lanes comparisons, no branches.
constexpr int64_t kRankedByPairs = 64;
// Up to this k the sort's second buffer lies on the stack; beyond, it is sorted in place.
constexpr int64_t kSortedByBytes = 1024;

// items[0..count) -> ordered, by their keys: largest first, equal ones in the order of their place.
// Every pair is compared, so there are no branches to guess; good for few. The array of keys is
// padded to whole vectors with INT32_MIN.
inline void rank_by_pairs(const int32_t* keys, const uint32_t* items, int64_t count,
                          int64_t* ordered) {
#if !defined(__AVX512F__)
  IntLanes lane;
  for (int l = 0; l < kFloatLanes; ++l) lane[l] = l;
#endif
  for (int64_t own = 0; own < count; own += kFloatLanes) {  // the vector that holds key i
    const IntLanes mine = load_keys(keys + own);
    const int64_t end = own + kFloatLanes < count ? own + kFloatLanes : count;
#if defined(__AVX512F__)
    uint32_t before = 0;  // a bit for each key of the vector that comes before key i
#endif
    for (int64_t i = own; i < end; ++i) {
      const IntLanes key = broadcast(keys[i]);
#if defined(__AVX512F__)
      int64_t rank = __builtin_popcount(greater(mine, key) | (equal(mine, key) & before));
      before = 2 * before + 1;
      for (int64_t j = 0; j < own; j += kFloatLanes)
        rank += __builtin_popcount(greater_equal(load_keys(keys + j), key));
      for (int64_t j = own + kFloatLanes; j < count; j += kFloatLanes)
        rank += __builtin_popcount(greater(load_keys(keys + j), key));
#else
      const IntLanes before = lane < broadcast(static_cast<int32_t>(i - own));
      IntLanes total = -((mine > key) | ((mine == key) & before));
      for (int64_t j = 0; j < own; j += kFloatLanes) total -= load_keys(keys + j) >= key;
      for (int64_t j = own + kFloatLanes; j < count; j += kFloatLanes)
        total -= load_keys(keys + j) > key;
      const int64_t rank = sum_lanes(total);
#endif
      ordered[rank] = items[i];
    }
  }
}

// ---- a key and its index in one integer ----

// Greater-first order of (key, index) pairs as one signed integer.
inline int64_t composite(int32_t key, int64_t index) {
  return static_cast<int64_t>(key) * (int64_t{1} << 32) + (0xffffffff - index);
}

struct Greater {
  bool operator()(int64_t a, int64_t b) const { return a > b; }
};

// pairs[0..k) -> order, largest first.
inline void rank_pairs(int64_t* pairs, int64_t k) {
  int64_t ordered[kRankedByPairs];
  for (int64_t i = 0; i < k; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < k; ++j) rank += pairs[j] > pairs[i];
    ordered[rank] = pairs[i];
  }
  std::memcpy(pairs, ordered, static_cast<size_t>(k) * sizeof(int64_t));
}

// The same for pairs in ascending index order: a stable counting sort over the bytes of the keys.
inline void sort_pairs_by_bytes(int64_t* pairs, int64_t k) {
  constexpr int64_t kSign = INT64_MIN;  // signed order to unsigned order
  int64_t other[kSortedByBytes];
  int64_t *from = pairs, *to = other;
  for (int shift = 32; shift < 64; shift += 8) {
    uint16_t starts[257] = {};
    const auto digit = [&](int64_t pair) {
      return 255 - ((static_cast<uint64_t>(pair ^ kSign) >> shift) & 255);
    };
    for (int64_t i = 0; i < k; ++i) ++starts[digit(from[i]) + 1];
    for (int d = 0; d < 256; ++d) starts[d + 1] += starts[d];
    for (int64_t i = 0; i < k; ++i) to[starts[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
}

inline void order_pairs(int64_t* pairs, int64_t k) {
  if (k <= kRankedByPairs) {
    rank_pairs(pairs, k);
  } else if (k <= kSortedByBytes) {
    sort_pairs_by_bytes(pairs, k);
  } else {
    std::sort(pairs, pairs + k, Greater{});
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
