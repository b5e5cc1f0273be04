// Long rows: one pass over a row in segments, with a proved threshold that only rises.
//
// A segment is dealt to groups, lane by lane; each group's maximum is kept. The k-th largest
// maximum t is a lower bound of the k-th largest element, since k different groups hold an element
// >= t. Elements >= t are the candidates (about 1.15 k of them on random data with 4 k groups).
// Groups are interleaved, not contiguous, so that sorted rows spread over all of them.
//
// Invariant after each segment: the candidates, in ascending index order, contain the k first
// elements, in the total order, of all that was read; k of them are >= threshold, so a later
// element matters only if it is > threshold.
#pragma once

#include "topk_order.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

constexpr int64_t kSegment = 4096;   // 16 KiB of float32: half of a small L1 cache
constexpr int64_t kStreamedK = 512;  // larger k are selected by digits
constexpr int64_t kRarelyTightened =
    64;  // below this a few more candidates cost less than a bisection
constexpr int64_t kCapacity = kSegment + 2 * kStreamedK;
constexpr int64_t kMaximumGroups =
    2 * kStreamedK > 8 * kFloatLanes ? 2 * kStreamedK : 8 * kFloatLanes;

// While a segment is examined the next one is fetched, from four places at once: memory then serves
// four pages, and hardware prefetchers, which stop at the end of a page, follow four streams.
// Measured on two cores: 1.4 ms for 33 MB, where one stream took 1.8 and no fetching 2.2.
constexpr int64_t kStreams = 4;

// 8 accumulators hide the latency of max, and all fit in registers.
constexpr int64_t kAccumulators = 8;

// Asks for part `part` of `parts` of the segment that starts at `start`, which need not exist.
template <class Stored>
inline void fetch(const Stored* start, int64_t part, int64_t parts) {
  constexpr int64_t kStreamBytes = kSegment * static_cast<int64_t>(sizeof(Stored)) / kStreams;
  const int64_t bytes = kStreamBytes / parts;
  const char* first = reinterpret_cast<const char*>(start) + part * bytes;
  for (int64_t stream = 0; stream < kStreams; ++stream) {
    for (int64_t byte = 0; byte < bytes; byte += kCacheLineBytes) {
      __builtin_prefetch(first + stream * kStreamBytes + byte);
    }
  }
}

class Candidates {
 public:
  explicit Candidates(int64_t k) : k_(k) {
    // at least 2 k groups, in whole blocks of accumulators
    const int64_t block = kAccumulators * kFloatLanes;
    group_vectors_ = (2 * k + block - 1) / block * kAccumulators;
  }

  void clear() {
    count_ = 0;
    bounded_ = false;
  }
  int64_t count() const { return count_; }
  uint32_t index(int64_t i) const { return indices_[i]; }
  int32_t key(int64_t i) const { return keys_[i]; }

  // Takes in x[0..count), count <= kSegment, whose first element has index `base`.
  // Returns false, with the candidates unchanged in meaning, when the segment holds a NaN.
  template <bool kAbsolute, class Stored>
  bool read(const Stored* x, int64_t base, int64_t count) {
    if (!bounded_ || !append_few<kAbsolute>(x, base, count)) {
      if (!group_maxima<kAbsolute>(x, count)) return false;
      admit<kAbsolute>(x, base, count);
    }
    if (count_ > 2 * k_ && count_ > kRarelyTightened) tighten();
    return true;
  }

  // Takes in one candidate of another instance, by ascending index.
  void add(int32_t key, uint32_t index) {
    if (count_ == kCapacity) tighten();
    keys_[count_] = key;
    indices_[count_++] = index;
  }

  // Keeps exactly the first k in the total order, still by ascending index.
  void tighten() {
    if (count_ <= k_) return;
    pad();
    const Range range = range_of(keys_, count_);
    const Bound bound = bisect(keys_, count_, k_, 0, range);
    // ties at an exact bound are taken from the left
    int64_t surplus = bound.at_least - k_;
    int64_t ties = surplus == 0 ? count_ : k_ - count_at_least(keys_, count_, bound.key + 1);
    int64_t kept = 0;
    int32_t smallest = range.high;
    for (int64_t i = 0; i < count_; ++i) {
      const int32_t key = keys_[i];
      if (key < bound.key || (surplus != 0 && key == bound.key && ties-- <= 0)) continue;
      smallest = key < smallest ? key : smallest;
      keys_[kept] = key;
      indices_[kept++] = indices_[i];
    }
    count_ = kept;
    threshold_ = float_of(smallest);
    bounded_ = true;
  }

 private:
  void pad() {
    for (int64_t i = count_; i % kFloatLanes != 0; ++i) keys_[i] = INT32_MIN;
  }

  // maxima_[g] = the largest element of group g; vector v of the segment belongs to groups
  // v % group_vectors_. Bound by one load and one max per vector.
  template <bool kAbsolute, class Stored>
  bool group_maxima(const Stored* x, int64_t count) {
    const int64_t vectors = count / kFloatLanes, whole = vectors / kAccumulators * kAccumulators;
    const FloatLanes lowest = broadcast(-std::numeric_limits<float>::infinity());
    uint32_t nan = 0;
    for (int64_t first = 0; first < group_vectors_; first += kAccumulators) {
      FloatLanes maxima[kAccumulators];
      for (auto& lanes : maxima) lanes = lowest;
      for (int64_t v = first; v < whole; v += group_vectors_) {
        for (int64_t a = 0; a < kAccumulators; a += 2) {
          const FloatLanes p = ranked_lanes<kAbsolute>(load(x + (v + a) * kFloatLanes));
          const FloatLanes q = ranked_lanes<kAbsolute>(load(x + (v + a + 1) * kFloatLanes));
          nan |= either_nan(p, q);
          maxima[a] = larger(p, maxima[a]);
          maxima[a + 1] = larger(q, maxima[a + 1]);
        }
      }
      for (int64_t a = 0; a < kAccumulators; ++a)
        store(maxima_ + (first + a) * kFloatLanes, maxima[a]);
    }
    for (int64_t v = whole; v < vectors; ++v) {
      float* group = maxima_ + v % group_vectors_ * kFloatLanes;
      const FloatLanes p = ranked_lanes<kAbsolute>(load(x + v * kFloatLanes));
      nan |= either_nan(p, p);
      store(group, larger(p, load(group)));
    }
    for (int64_t i = vectors * kFloatLanes; i < count; ++i) {
      const float value = ranked<kAbsolute>(to_sum(x[i]));
      float& group = maxima_[vectors % group_vectors_ * kFloatLanes + i % kFloatLanes];
      nan |= value != value;
      group = value > group ? value : group;
    }
    return nan == 0;
  }

  // Appends the segment's candidates, raising the threshold first where the maxima prove a higher
  // one.
  template <bool kAbsolute, class Stored>
  void admit(const Stored* x, int64_t base, int64_t count) {
    alignas(kCacheLineBytes) int32_t keys[kMaximumGroups];
    const int64_t groups = group_vectors_ * kFloatLanes;
    for (int64_t g = 0; g < groups; g += kFloatLanes) {
      const IntLanes lanes = keys_of(load(maxima_ + g));
      std::memcpy(keys + g, &lanes, sizeof(lanes));
    }
    if (bounded_ && count_at_least(keys, groups, key_of(threshold_) + 1) < k_) {
      scan<kAbsolute, false>(x, base, count);
      return;
    }
    const Bound bound = bisect(keys, groups, k_, slack(), range_of(keys, groups));
    threshold_ = float_of(bound.key);
    bounded_ = true;
    const int64_t before = count_;
    if (bound.at_least <= k_ + slack()) {
      scan<kAbsolute, true>(x, base, count);
      return;
    }
    // Many equal maxima: take what is above, then only as many ties as are missing.
    scan<kAbsolute, false>(x, base, count);
    const int64_t missing = k_ - (count_ - before);
    if (missing > 0) {
      count_ = before;
      scan_with_ties<kAbsolute>(x, base, count, missing);
    }
  }

  int64_t slack() const { return k_ / 8 + 2; }

  void append(int32_t key, int64_t index) {
    keys_[count_] = key;
    indices_[count_++] = static_cast<uint32_t>(index);
  }

  template <bool kAbsolute, class Stored>
  void take(const Stored* x, int64_t base, int64_t i, uint32_t hits) {
    for (; hits != 0; hits &= hits - 1) {
      const int64_t at = i + __builtin_ctz(hits);
      append(key_of(ranked<kAbsolute>(to_sum(x[at]))), base + at);
    }
  }

  // The usual segment once there is a threshold: one pass, a branch per 8 vectors, few elements
  // above it. False, with nothing appended, when there are many (rising rows) or a NaN: the maxima
  // then deal with the segment.
  template <bool kAbsolute, class Stored>
  bool append_few(const Stored* x, int64_t base, int64_t count) {
    constexpr int64_t kBlock = kAccumulators * kFloatLanes;
    // one line of each stream, or as many as a block holds
    constexpr int64_t kLine = kStreams * kCacheLineBytes / static_cast<int64_t>(sizeof(Stored));
    constexpr int64_t kFetched = kLine > kBlock ? kLine : kBlock;
    const FloatLanes bound = broadcast(threshold_);
    const int64_t before = count_, most = before + k_ + kRarelyTightened;
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) {
      FloatLanes lanes[kAccumulators];
      if (i % kFetched == 0) fetch(x + kSegment, i / kFetched, kSegment / kFetched);
      for (int v = 0; v < kAccumulators; ++v) {
        lanes[v] = ranked_lanes<kAbsolute>(load(x + i + v * kFloatLanes));
      }
      uint32_t nan = 0;
      FloatLanes largest = lanes[0];
      for (int v = 0; v < kAccumulators; v += 2) nan |= either_nan(lanes[v], lanes[v + 1]);
      for (int v = 1; v < kAccumulators; ++v) largest = larger(lanes[v], largest);
      if ((nan | greater(largest, bound)) == 0) continue;
      for (int v = 0; v < kAccumulators; ++v) {
        take<kAbsolute>(x, base, i + v * kFloatLanes, greater(lanes[v], bound));
      }
      if (nan != 0 || count_ > most) {
        count_ = before;
        return false;
      }
    }
    for (; i < count; ++i) {
      const float value = ranked<kAbsolute>(to_sum(x[i]));
      if (value > threshold_) append(key_of(value), base + i);
      if (value != value) {
        count_ = before;
        return false;
      }
    }
    return true;
  }

  // Appends what is > threshold (>= when kInclusive), in index order. About half of all 64 elements
  // hold a candidate, which no branch predictor can guess: a first pass notes the words with hits
  // without a branch, a second one walks these.
  template <bool kAbsolute, bool kInclusive, class Stored>
  void scan(const Stored* x, int64_t base, int64_t count) {
    constexpr int64_t kWord = 64;
    constexpr int64_t kPart = 4 / sizeof(Stored);  // words behind one line of each stream
    const FloatLanes bound = broadcast(threshold_);
    uint64_t words[kSegment / kWord];
    int32_t with_hits[kSegment / kWord];
    const int64_t whole = count / kWord;
    int64_t found = 0;
    for (int64_t w = 0; w < whole; ++w) {
      const Stored* first = x + w * kWord;
      // the segment itself is in cache by now: fetch the next one meanwhile
      if (w % kPart == 0) fetch(x + kSegment, w / kPart, kSegment / kWord / kPart);
      uint64_t hits = 0;
      for (int v = 0; v < kWord; v += kFloatLanes) {
        const FloatLanes lanes = ranked_lanes<kAbsolute>(load(first + v));
        const uint64_t bits = kInclusive ? greater_equal(lanes, bound) : greater(lanes, bound);
        hits |= bits << v;
      }
      words[w] = hits;
      with_hits[found] = static_cast<int32_t>(w);
      found += hits != 0;
    }
    for (int64_t j = 0; j < found; ++j) {
      const int64_t i = with_hits[j] * kWord;
      uint64_t hits = words[with_hits[j]];
      do {
        const int64_t at = i + __builtin_ctzll(hits);
        append(key_of(ranked<kAbsolute>(to_sum(x[at]))), base + at);
      } while ((hits &= hits - 1) != 0);
    }
    for (int64_t i = whole * kWord; i < count; ++i) {
      const float value = ranked<kAbsolute>(to_sum(x[i]));
      if (kInclusive ? value >= threshold_ : value > threshold_) append(key_of(value), base + i);
    }
  }

  // Appends what is > threshold and the first `ties` elements equal to it, in index order.
  template <bool kAbsolute, class Stored>
  void scan_with_ties(const Stored* x, int64_t base, int64_t count, int64_t ties) {
    const FloatLanes bound = broadcast(threshold_);
    const int32_t tie = key_of(threshold_);
    int64_t i = 0;
    const auto consider = [&](int64_t at) {
      const int32_t key = key_of(ranked<kAbsolute>(to_sum(x[at])));
      if (key > tie || (key == tie && ties-- > 0)) append(key, base + at);
    };
    for (; i + kFloatLanes <= count && ties > 0; i += kFloatLanes) {
      uint32_t bits = greater_equal(ranked_lanes<kAbsolute>(load(x + i)), bound);
      for (; bits != 0; bits &= bits - 1) consider(i + __builtin_ctz(bits));
    }
    for (; i + kFloatLanes <= count; i += kFloatLanes) {
      uint32_t bits = greater(ranked_lanes<kAbsolute>(load(x + i)), bound);
      for (; bits != 0; bits &= bits - 1) consider(i + __builtin_ctz(bits));
    }
    for (; i < count; ++i) {
      if (ranked<kAbsolute>(to_sum(x[i])) >= threshold_) consider(i);
    }
  }

  int64_t k_, group_vectors_, count_ = 0;
  bool bounded_ = false;  // whether threshold_ holds a bound
  float threshold_ = 0.0f;
  alignas(kCacheLineBytes) float maxima_[kMaximumGroups];
  alignas(kCacheLineBytes) int32_t keys_[kCapacity];
  uint32_t indices_[kCapacity];
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
