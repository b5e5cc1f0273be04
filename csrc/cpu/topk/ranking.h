// A few codes in the order of their keys, largest first: every pair is compared.
#pragma once

#include "cpu/order/bound.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Up to this k every pair is compared to rank a row: k^2 / lanes comparisons, no branches.
constexpr int64_t kRankedByPairs = 64;

template <class Key>
using KeyVector = decltype(load_keys(static_cast<const Key*>(nullptr)));

// 0, 1, ... in the lanes.
template <class Key>
inline KeyVector<Key> lane_numbers() {
  KeyVector<Key> lanes;
  for (int lane = 0; lane < kKeyLanes<Key>; ++lane) lanes[lane] = lane;
  return lanes;
}

// Calls place(i, rank) for each key i: how many keys come before it. The larger one does, of equal
// ones the one with the smaller i. The array of keys is padded.
template <class Key, class Place>
inline void rank_keys(const Key* keys, int64_t count, const Place& place) {
  using Lanes = KeyVector<Key>;
  const Lanes lanes = lane_numbers<Key>();
  for (int64_t own = 0; own < count; own += kKeyLanes<Key>) {
    const Lanes mine = load_keys(keys + own);
    const int64_t end = own + kKeyLanes<Key> < count ? own + kKeyLanes<Key> : count;
    Lanes rank = {};
    for (int64_t j = 0; j < own; ++j) {
      rank = count_reaching<Comparison::kGreaterEqual>(rank, broadcast(keys[j]), mine);
    }
    for (int64_t j = own; j < end; ++j) {  // an equal key comes before later lanes
      const Lanes limit = mine + (Lanes)(lanes > broadcast(static_cast<Key>(j - own)));
      rank = count_reaching<Comparison::kGreater>(rank, broadcast(keys[j]), limit);
    }
    for (int64_t j = end; j < count; ++j) {
      rank = count_reaching<Comparison::kGreater>(rank, broadcast(keys[j]), mine);
    }
    Key ranks[kKeyLanes<Key>];
    std::memcpy(ranks, &rank, sizeof(rank));
    for (int64_t i = own; i < end; ++i) place(i, ranks[i - own]);
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
