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

// How many keys come before each key of the vector at `own`: larger ones, and equal ones with a
// smaller place. One key is compared with the whole vector at a time; of those that win a tie it is
// compared with the keys less 1, which takes one instruction everywhere.
template <class Key>
inline KeyVector<Key> ranks_at(const Key* keys, int64_t count, int64_t own) {
  using Lanes = KeyVector<Key>;
  const Lanes mine = load_keys(keys + own), lanes = lane_numbers<Key>();
  const int64_t end = own + kKeyLanes<Key> < count ? own + kKeyLanes<Key> : count;
  const auto count_larger = [&](Lanes total, int64_t j, Lanes limit) {
    return count_reaching<Comparison::kGreater>(total, broadcast(keys[j]), limit);
  };
  Lanes ranks = {};
  for (int64_t j = 0; j < own; ++j) ranks = count_larger(ranks, j, mine - 1);
  for (int64_t j = own; j < end; ++j) {  // it wins ties with later lanes
    const auto later = (Lanes)(lanes > broadcast(static_cast<Key>(j - own)));
    ranks = count_larger(ranks, j, mine + later);
  }
  for (int64_t j = end; j < count; ++j) ranks = count_larger(ranks, j, mine);
  return ranks;
}

// Calls place(i, rank) for each key i: how many keys come before it. The larger one does, of equal
// ones the one with the smaller i. The array of keys is padded.
template <class Key, class Place>
inline void rank_keys(const Key* keys, int64_t count, const Place& place) {
  for (int64_t own = 0; own < count; own += kKeyLanes<Key>) {
    const KeyVector<Key> lanes = ranks_at(keys, count, own);
    Key ranks[kKeyLanes<Key>];
    std::memcpy(ranks, &lanes, sizeof(lanes));
    const int64_t left = count - own;
    for (int64_t i = 0; i < kKeyLanes<Key> && i < left; ++i) place(own + i, ranks[i]);
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
