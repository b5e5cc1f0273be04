// Which way of selecting a row takes, and how rows are divided among threads: the one place that
// decides. docs/how-topk-works.md explains the regimes.
#pragma once

#include <algorithm>

#include "cpu/common/threads.h"
#include "cpu/simd/lanes.h"
#include "cpu/topk/ranking.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

enum class Regime {
  kFirst,       // k = 1: the largest element alone (first.h)
  kRanked,      // every pair of the row's keys is compared (ranking.h)
  kCandidates,  // one pass with a proved bound (candidates.h)
  kHalving,     // the k-th key by halving the interval that it lies in (halving.h)
  kDigits       // the k-th key by counting digits, in several passes (order/digits.h)
};

// ---- limits of the regimes ----

constexpr int64_t kRankedRow = kRankedByPairs;  // the longest row whose keys are ranked at once
// The largest k of the candidates. What they need on the stack is the same for each dtype.
template <class Stored>
constexpr int64_t kCandidateK = sizeof(Stored) == 8 ? 256 : 512;
// Elements read at a time: at most half of a second-level cache.
template <class Stored>
constexpr int64_t kSegment = sizeof(Stored) == 8 ? 16384 : 32768;
// A row whose elements do not lie side by side is gathered first, so much at a time.
template <class Stored>
constexpr int64_t kStridedSegment = sizeof(Stored) == 8 ? 2048 : 4096;
constexpr int64_t kWord = 64;           // elements whose comparisons fill one word of bits
constexpr int64_t kSmallestBlock = 16;  // for a k that is large in a short row
constexpr int64_t kGroupsPerK = 4;      // groups compared for one wanted element, where there are
// Blocks are halved until there are kGroupsPerK * k groups, so there are never twice as many.
template <class Stored>
constexpr int64_t kMaximumGroups = 2 * kGroupsPerK * kCandidateK<Stored>;
// Keys that are held at once while an interval is halved: they lie where the maxima of the groups
// would.
template <class Stored>
constexpr int64_t kHeldKeys = kMaximumGroups<Stored>;

// Of shorter rows, in multiples of k, so much is wanted that a bound from groups does not pay.
constexpr int64_t kHalvedBelow = 6;

// Groups that `count` elements make: each lane of each block is one.
template <class Stored>
inline int64_t groups_of(int64_t count, int64_t block) {
  return (count + block - 1) / block * Sum<Stored>::kLanes;
}

// Whether rows of n elements have enough groups to prove a useful bound for k.
template <class Stored>
inline bool has_useful_bound(int64_t n, int64_t k) {
  if (k > kCandidateK<Stored>) return false;
  const int64_t groups = groups_of<Stored>(n, kSmallestBlock);
  if (groups <= kMaximumGroups<Stored>) return groups >= std::min(2 * k, n);
  return groups_of<Stored>(n < kSegment<Stored> ? n : kSegment<Stored> / 2, kWord) >= 2 * k;
}

// Elements of a row, or of `n` of them, that are read at a time.
template <class Stored>
inline int64_t contiguous(int64_t n, int64_t stride) {
  return stride == 1 ? n : std::min(n, kStridedSegment<Stored>);
}

// Of rows of n elements. A row of the candidates that turns out to hold a NaN is halved, or, with a
// stride, goes to the digits.
template <class Stored>
inline Regime regime_for(int64_t n, int64_t stride, int64_t k) {
  if (k == 1 && stride == 1) return Regime::kFirst;
  if (n <= kRankedRow) return Regime::kRanked;
  const bool halved = stride == 1 && n < kHalvedBelow * k;
  if (!halved && has_useful_bound<Stored>(contiguous<Stored>(n, stride), k)) {
    return Regime::kCandidates;
  }
  return stride == 1 ? Regime::kHalving : Regime::kDigits;
}

// ---- threads ----

// One element: read side by side once or several times; gathered with a stride, or by digits. One
// selected element.
constexpr double kNanosecondsAdjacent = 0.06, kNanosecondsHalved = 0.5;
constexpr double kNanosecondsStrided = 1, kNanosecondsByDigits = 4;
constexpr double kNanosecondsPerSelected = 6;
// One thread takes at least this much of a batch at a time, and of a single row.
constexpr int64_t kGrainBytes = 64 << 10;
constexpr int64_t kSliceElements = 64 << 10;
constexpr int64_t kChunksPerThread = 8;  // enough to even out a slow thread

// How long a row takes one thread.
inline double nanoseconds_of_row(Regime regime, int64_t n, int64_t stride, int64_t k) {
  const double element = regime == Regime::kDigits    ? kNanosecondsByDigits
                         : stride != 1                ? kNanosecondsStrided
                         : regime == Regime::kHalving ? kNanosecondsHalved
                                                      : kNanosecondsAdjacent;
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
