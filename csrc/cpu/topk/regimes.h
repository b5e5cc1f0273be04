// Which way of selecting a row takes, and how rows are divided among threads: the one place that
// decides. docs/how-topk-works.md explains the regimes.
#pragma once

#include <algorithm>

#include "cpu/common/threads.h"
#include "cpu/simd/lanes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

enum class Regime {
  kCandidates,  // one pass with a proved bound (candidates.h)
  kShort,       // all keys of the row in the L1 cache, and a bisection over them (short_row.h)
  kDigits       // the k-th key by counting digits, in several passes (order/digits.h)
};

// ---- limits of the regimes ----

constexpr int64_t kCandidateK = 512;  // the largest k of the candidates
constexpr int64_t kSegment = 32768;   // 128 KiB of float32: at most half of a second-level cache
// A row whose elements do not lie side by side is gathered first, so much at a time.
constexpr int64_t kStridedSegment = 4096;
constexpr int64_t kWord = 64;           // elements whose comparisons fill one word of bits
constexpr int64_t kSmallestBlock = 16;  // for a k that is large in a short row
constexpr int64_t kGroupsPerK = 4;      // groups compared for one wanted element, where there are
// Blocks are halved until there are kGroupsPerK * k groups, so there are never twice as many.
constexpr int64_t kMaximumGroups = 2 * kGroupsPerK * kCandidateK;
// The longest row whose keys are all held at once: they lie where the maxima of the groups would.
constexpr int64_t kShortRow = kMaximumGroups;

// Groups that `count` elements make: each lane of each block is one.
inline int64_t groups_of(int64_t count, int64_t block) {
  return (count + block - 1) / block * kFloatLanes;
}

// Whether rows of n elements have enough groups to prove a useful bound for k.
inline bool has_useful_bound(int64_t n, int64_t k) {
  if (k > kCandidateK) return false;
  if (groups_of(n, kSmallestBlock) <= kMaximumGroups) {
    return groups_of(n, kSmallestBlock) >= std::min(2 * k, n);
  }
  return groups_of(n < kSegment ? n : kSegment / 2, kWord) >= 2 * k;
}

// Elements of a row, or of `n` of them, that are read at a time.
inline int64_t contiguous(int64_t n, int64_t stride) {
  return stride == 1 ? n : std::min(n, kStridedSegment);
}

// Of rows of n elements of a dtype with keys of 32 bits (all but float64). A row of the candidates
// that turns out to hold a NaN goes to the digits.
inline Regime regime_for(bool narrow_keys, int64_t n, int64_t stride, int64_t k) {
  if (!narrow_keys) return Regime::kDigits;
  if (has_useful_bound(contiguous(n, stride), k)) return Regime::kCandidates;
  return n <= kShortRow ? Regime::kShort : Regime::kDigits;
}

// ---- threads ----

// One element: of the candidates, read side by side or gathered with a stride; in another regime.
// One selected element.
constexpr double kNanosecondsAdjacent = 0.06, kNanosecondsStrided = 1, kNanosecondsByDigits = 4;
constexpr double kNanosecondsPerSelected = 6;
// One thread takes at least this much of a batch at a time, and of a single row.
constexpr int64_t kGrainBytes = 64 << 10;
constexpr int64_t kSliceElements = 64 << 10;
constexpr int64_t kChunksPerThread = 8;  // enough to even out a slow thread

// How long a row takes one thread.
inline double nanoseconds_of_row(Regime regime, int64_t n, int64_t stride, int64_t k) {
  const double element = regime != Regime::kCandidates ? kNanosecondsByDigits
                         : stride == 1                 ? kNanosecondsAdjacent
                                                       : kNanosecondsStrided;
  return element * static_cast<double>(n) + kNanosecondsPerSelected * static_cast<double>(k);
}

// Into how many slices each row is cut, for a thread each; 1: rows are handed out whole. Only the
// candidates can be merged.
inline int64_t slices_for(Regime regime, int64_t rows, int64_t n, double row_nanoseconds,
                          int threads) {
  if (regime != Regime::kCandidates || rows >= threads) return 1;
  const int64_t slices =
      std::min<int64_t>(useful_threads(threads, row_nanoseconds), n / kSliceElements);
  return std::max<int64_t>(slices, 1);
}

// Rows that a thread takes at a time. Neighbouring rows stay with a thread, so that what it fetches
// ahead is of use to it.
inline int64_t rows_at_once(int64_t rows, int64_t row_bytes, int team) {
  const int64_t least = std::max<int64_t>(1, kGrainBytes / row_bytes);
  return std::max(std::min(least, rows / team), rows / (kChunksPerThread * team));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
