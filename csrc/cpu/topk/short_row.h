// A row whose keys all fit the L1 cache, for a k that is too large for the candidates.
#pragma once

#include "cpu/topk/regimes.h"
#include "cpu/topk/row.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// row.indices = the k selected ones, ascending; n <= kShortRow, and `keys` has room for as many.
template <bool kAbsolute, class Stored>
inline void select_short(const Row<Stored>& row, int32_t* keys) {
  for (int64_t i = 0; i < row.n; ++i) keys[i] = key_at<kAbsolute>(row, i);
  const int64_t padded = (row.n + kFloatLanes - 1) / kFloatLanes * kFloatLanes;
  for (int64_t i = row.n; i < padded; ++i) keys[i] = INT32_MIN;
  const Bound bound = bisect(keys, row.n, row.k, 0, range_of(keys, row.n));
  int64_t ties = row.k;
  if (bound.at_least > row.k)
    ties -= bound.key == INT32_MAX ? 0 : count_at_least(keys, row.n, bound.key + 1);
  const IntLanes limit = broadcast(bound.key);
  int64_t count = 0;
  for (int64_t i = 0; i < padded; i += kFloatLanes) {
    const IntLanes lanes = load_keys(keys + i);
    for (uint32_t bits = bits_of(lanes >= limit); bits != 0; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      if (keys[at] == bound.key && ties-- <= 0) continue;
      row.indices[count++] = at;
    }
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
