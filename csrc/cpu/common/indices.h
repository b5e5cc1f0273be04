// Checking indices before anything is written.
#pragma once

#include <cstdint>

#include "cpu/common/parallel.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Indices checked between two looks at the verdict: 32 KiB of int64, which stay in the L1 cache.
constexpr int64_t kIndexBlock = 4096;
constexpr double kNanosecondsPerIndex = 0.25;

// Position of the first index outside 0..n-1 in [begin, end), or `end`.
template <class Index>
int64_t first_bad_in_block(const Index* indices, int64_t begin, int64_t end, int64_t n) {
  uint64_t bad = 0;
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t index = static_cast<uint64_t>(static_cast<int64_t>(indices[i]));
    // The sign bit is set by a negative index and by one above n - 1.
    bad |= index | (static_cast<uint64_t>(n - 1) - index);
  }
  if ((bad >> 63) == 0) return end;
  int64_t i = begin;
  while (indices[i] >= 0 && indices[i] < n) ++i;
  return i;
}

// Position of the first index outside 0..n-1, or -1. Each thread checks whole blocks.
template <class Index>
int64_t first_bad_index(const Index* indices, int64_t count, int64_t n, int threads) {
  const int64_t blocks = (count + kIndexBlock - 1) / kIndexBlock;
  const int team = useful_threads(threads, kNanosecondsPerIndex * static_cast<double>(count));
  int64_t first = count;
  share_out(team, blocks, [&](int64_t block) {
    const int64_t begin = block * kIndexBlock;
    const int64_t end = begin + kIndexBlock < count ? begin + kIndexBlock : count;
    const int64_t bad = first_bad_in_block(indices, begin, end, n);
    if (bad < end) lower(&first, bad);
  });
  return first < count ? first : -1;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
