// One row: its elements as keys, and its codes, put in order and written.
#pragma once

#include <type_traits>

#include "cpu/common/clear.h"
#include "cpu/topk/ranking.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// One row of x, and where its results go.
template <class Stored>
struct Row {
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

// Ascending row.indices -> largest first, if that is asked for. 32-bit keys are sorted with their
// index in one integer.
template <bool kAbsolute, class Stored>
inline void order_row(const Row<Stored>& row) {
  if (!row.sorted) return;
  if constexpr (std::is_same_v<Stored, double>) {
    std::sort(row.indices, row.indices + row.k, [&](int64_t a, int64_t b) {
      const int64_t first = key_at<kAbsolute>(row, a), second = key_at<kAbsolute>(row, b);
      return first != second ? first > second : a < b;
    });
  } else {
    for (int64_t j = 0; j < row.k; ++j) {
      row.indices[j] = composite(key_at<kAbsolute>(row, row.indices[j]), row.indices[j]);
    }
    order_pairs(row.indices, row.k);
    for (int64_t j = 0; j < row.k; ++j) row.indices[j] = 0xffffffff - (row.indices[j] & 0xffffffff);
  }
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
