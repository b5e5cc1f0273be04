// One row: its elements as keys, and its codes, put in order and written.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/common/clear.h"
#include "cpu/topk/sorting.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// One row of x, and where its results go.
template <class Stored>
struct Row {
  using Key = typename Sum<Stored>::Integer;

  const Stored* x;
  int64_t n, stride, k;
  bool sorted, relu;
  Stored* values;
  int64_t* indices;
  Stored* masked;
  int64_t* counts;
  bool past_caches;  // whether `masked` is written past them
};

template <bool kAbsolute, class Stored>
inline auto key_at(const Row<Stored>& row, int64_t i) {
  return key_of(compared<kAbsolute>(to_sum(row.x[i * row.stride])));
}

// Ascending row.indices -> largest first: few, of which every pair is compared.
template <bool kAbsolute, class Stored>
inline void order_by_pairs(const Row<Stored>& row) {
  typename Row<Stored>::Key keys[kRankedByPairs];
  int64_t ascending[kRankedByPairs];
  for (int64_t j = 0; j < row.k; ++j) keys[j] = key_at<kAbsolute>(row, row.indices[j]);
  pad(keys, row.k);
  std::memcpy(ascending, row.indices, static_cast<size_t>(row.k) * sizeof(int64_t));
  rank_keys(keys, row.k, [&](int64_t j, int64_t rank) { row.indices[rank] = ascending[j]; });
}

// Many, each key in one integer with its index.
template <bool kAbsolute, class Stored>
inline void order_by_composites(const Row<Stored>& row) {
  using Key = typename Row<Stored>::Key;
  const auto key = [&](int64_t i) { return key_at<kAbsolute>(row, i); };
  int64_t* const indices = row.indices;
  Range<Key> range{std::numeric_limits<Key>::min(), std::numeric_limits<Key>::max()};
  if constexpr (sizeof(Key) == 8) {  // there is hardly room for all of these
    range = {range.high, range.low};
    for (int64_t j = 0; j < row.k; ++j) {
      range.low = std::min(range.low, key(indices[j]));
      range.high = std::max(range.high, key(indices[j]));
    }
  }
  const Composites<Key> composites(range.low, range.high, row.n);
  for (int64_t j = 0; j < row.k; ++j) indices[j] = composites.of(key(indices[j]), indices[j]);
  sort_items(indices, row.k);
  if (composites.exact()) {
    for (int64_t j = 0; j < row.k; ++j) indices[j] = composites.index(indices[j]);
    return;
  }
  // what shares a key is ordered by the keys themselves
  for (int64_t begin = 0, end = 0; begin < row.k; begin = end) {
    const int64_t first = indices[begin];
    for (; end < row.k && composites.share_key(first, indices[end]); ++end) {
      indices[end] = composites.index(indices[end]);
    }
    if (end - begin == 1) continue;
    std::sort(indices + begin, indices + end,
              [&](int64_t a, int64_t b) { return key(a) != key(b) ? key(a) > key(b) : a < b; });
  }
}

// Ascending row.indices -> largest first, if that is asked for.
template <bool kAbsolute, class Stored>
inline void order_row(const Row<Stored>& row) {
  if (!row.sorted) return;
  if (row.k <= kRankedByPairs) return order_by_pairs<kAbsolute>(row);
  order_by_composites<kAbsolute>(row);
}

// Selected indices, in their final order -> values, the masked row, counts.
template <class Stored>
inline void write_row(const Row<Stored>& row) {
  for (int64_t j = 0; j < row.k; ++j) row.values[j] = row.x[row.indices[j] * row.stride];
  if (row.relu) {
    for (int64_t j = 0; j < row.k; ++j) {
      if (to_sum(row.values[j]) <= 0) row.values[j] = Stored{};
    }
  }
  if (row.masked != nullptr) {
    clear(row.masked, row.n * static_cast<int64_t>(sizeof(Stored)), row.past_caches);
    for (int64_t j = 0; j < row.k; ++j) row.masked[row.indices[j]] = row.values[j];
  }
  if (row.counts != nullptr) {  // integer additions in any order give one result
    for (int64_t j = 0; j < row.k; ++j) {
      const int64_t fired = to_sum(row.values[j]) != 0;
      __atomic_fetch_add(row.counts + row.indices[j], fired, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
