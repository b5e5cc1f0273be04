// Rows read once, in segments that fit the second-level cache, with a proved threshold that only
// rises.
//
// A segment is dealt to blocks of neighbouring vectors. One pass reduces each block to a vector of
// maxima, lane by lane: one load and one max per vector, no branch, at the speed of memory. Every
// lane of every block is a group of elements, and the k-th largest of the groups' maxima, t, is a
// lower bound of the k-th largest element, since k different groups hold an element >= t. Only
// blocks with a maximum >= t are read again, from the cache; their elements >= t are the candidates
// (about 1.2 k of them on random data).
//
// Invariant after each segment: the candidates, in ascending index order, contain the k first
// elements, in the total order, of all that was read; k of them are >= threshold, so a later
// element matters only if it is > threshold.
#pragma once

#include "cpu/order/order.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

constexpr int64_t kSegment = 32768;  // 128 KiB of float32: at most half of a second-level cache
// Larger k: rows up to kShortRow by bisection (select_short in topk.cpp), longer ones by digits.
constexpr int64_t kStreamedK = 512;
// Up to this k every pair is compared to rank a row: k^2 / lanes comparisons, no branches.
constexpr int64_t kRankedByPairs = 64;
constexpr int64_t kRarelyTightened = 64;  // a few candidates more cost less than a bisection
constexpr int64_t kWord = 64;             // elements whose comparisons fill one word of bits
constexpr int64_t kLargestBlock = 4 * kWord;
constexpr int64_t kSmallestBlock = 16;  // for k that is large in a short row
constexpr int64_t kGroupsPerK = 4;      // groups compared for one wanted element, where there are
// Blocks are halved until there are kGroupsPerK * k groups, so there are never twice as many.
constexpr int64_t kMaximumGroups = 2 * kGroupsPerK * kStreamedK;
constexpr int64_t kShortRow = kMaximumGroups;  // keys that fit where the maxima lie
constexpr int64_t kCapacity = 3 * kStreamedK + kWord;

// A segment is read from two places at once, and each is fetched ahead: hardware prefetchers stop
// at the end of a page, and memory serves several streams better than one. While the candidates
// are collected from the cache, memory goes on with the next segment. Measured on (256, 32768)
// float32 out of the caches, two threads: Zen 5 0.75 ms without fetching, 0.63 with it, for any
// number of streams; on Cascade Lake a plain read took 2.2 ms without, 1.8 with one stream and 1.4
// with four.
constexpr int64_t kStreams = 2;
constexpr int64_t kBytesAhead = 8192;       // in each stream
constexpr int64_t kBytesPerCompared = 256;  // fetched while a word is compared

class Candidates {
 public:
  // For rows of n elements, of which k <= kStreamedK are wanted. The larger its blocks, the faster
  // a segment is reduced; the smaller, the fewer elements are read again.
  Candidates(int64_t n, int64_t k) : k_(k) {
    const int64_t segments = (n + kSegment - 1) / kSegment;
    segment_ = (n + segments - 1) / segments;
    segment_ = (segment_ + kLargestBlock - 1) / kLargestBlock * kLargestBlock;
    const int64_t first = n < segment_ ? n : segment_;
    while (block_ > kWord && groups(first, block_) < kGroupsPerK * k) block_ /= 2;
    if (groups(first, block_) < 2 * k) block_ = kSmallestBlock;
  }

  // Whether rows of n elements have enough groups to prove a useful bound for k.
  static bool suits(int64_t n, int64_t k) {
    if (k > kStreamedK) return false;
    if (groups(n, kSmallestBlock) <= kMaximumGroups) {
      return groups(n, kSmallestBlock) >= (2 * k < n ? 2 * k : n);
    }
    return groups(n < kSegment ? n : kSegment / 2, kWord) >= 2 * k;
  }

  void clear() {
    count_ = 0;
    bounded_ = false;
  }
  int64_t segment() const { return segment_; }
  int32_t* short_row() { return keys_of_row_; }  // room for kShortRow keys; no reading meanwhile
  int64_t count() const { return count_; }
  uint32_t index(int64_t i) const { return indices_[i]; }
  int32_t key(int64_t i) const { return keys_[i]; }

  // Takes in x[0..count), count <= segment(), whose first element has index `base`. What lies
  // `ahead` elements further is fetched meanwhile; it need not exist.
  // Returns false, with the candidates unchanged, when the segment holds a NaN.
  template <bool kAbsolute, class Stored>
  bool read(const Stored* x, int64_t base, int64_t count, int64_t ahead) {
    if (!reduce<kAbsolute>(x, count, ahead)) return false;
    next_ = reinterpret_cast<const char*>(x + ahead) + kBytesAhead;
    admit<kAbsolute>(x, base, count);
    if (count_ > 2 * k_ + kRarelyTightened) tighten();
    return true;
  }

  // Takes in one candidate of another instance, by ascending index.
  void add(int32_t key, uint32_t index) {
    if (count_ == kCapacity) tighten();
    append(key, index);
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

  // The indices of the first k, largest first; k <= kRankedByPairs.
  void rank(int64_t* indices) {
    if (count_ > 2 * k_ + kRarelyTightened) tighten();
    pad();
    int64_t ordered[2 * kRankedByPairs + kRarelyTightened];
    rank_by_pairs(keys_, indices_, count_, ordered);
    std::memcpy(indices, ordered, static_cast<size_t>(k_) * sizeof(int64_t));
  }

 private:
  static int64_t groups(int64_t count, int64_t block) {
    return (count + block - 1) / block * kFloatLanes;
  }

  void pad() {
    for (int64_t i = count_; i % kFloatLanes != 0; ++i) keys_[i] = INT32_MIN;
  }

  void append(int32_t key, int64_t index) {
    keys_[count_] = key;
    indices_[count_++] = static_cast<uint32_t>(index);
  }

  // ---- one pass over the segment: the maxima of its blocks ----

  template <bool kAbsolute, class Stored>
  bool reduce(const Stored* x, int64_t count, int64_t ahead) {
    if (block_ == kLargestBlock) return reduce<kAbsolute, kLargestBlock>(x, count, ahead);
    if (block_ == kLargestBlock / 2) return reduce<kAbsolute, kLargestBlock / 2>(x, count, ahead);
    if (block_ == kWord) return reduce<kAbsolute, kWord>(x, count, ahead);
    return reduce<kAbsolute, kSmallestBlock>(x, count, ahead);
  }

  template <bool kAbsolute, int64_t kBlock, class Stored>
  bool reduce(const Stored* x, int64_t count, int64_t ahead) {
    constexpr int64_t kSize = sizeof(Stored);
    constexpr int64_t kBlocksAhead = kBytesAhead / (kBlock * kSize);
    const int64_t whole = count / kBlock, stream = whole / kStreams;
    NanSearch nan;
    for (int64_t i = 0; i < stream; ++i) {
      // past the end of a stream comes its continuation in the next segment
      const int64_t later = i + kBlocksAhead;
      const Stored* next =
          x + (later < stream ? later * kBlock : (later - stream) * kBlock + ahead);
      for (int64_t s = 0; s < kStreams; ++s) {
        const int64_t block = s * stream + i;
        for (int64_t byte = 0; byte < kBlock * kSize; byte += kCacheLineBytes) {
          __builtin_prefetch(reinterpret_cast<const char*>(next + s * stream * kBlock) + byte);
        }
        reduce_block<kAbsolute, kBlock>(x, block, &nan);
      }
    }
    for (int64_t block = kStreams * stream; block < whole; ++block) {
      reduce_block<kAbsolute, kBlock>(x, block, &nan);
    }
    blocks_ = whole;
    bool ordered = !nan.found();
    if (whole * kBlock < count) {  // one more block, in part
      float* maxima = maxima_ + blocks_++ * kFloatLanes;
      store(maxima, broadcast(-std::numeric_limits<float>::infinity()));
      for (int64_t i = whole * kBlock; i < count; ++i) {
        const float value = ranked<kAbsolute>(to_sum(x[i]));
        ordered &= value == value;
        if (value > maxima[i % kFloatLanes]) maxima[i % kFloatLanes] = value;
      }
    }
    return ordered;
  }

  template <bool kAbsolute, int64_t kBlock, class Stored>
  void reduce_block(const Stored* x, int64_t block, NanSearch* nan) {
    FloatLanes low, high;
    x += block * kBlock;
    if constexpr (kBlock == kFloatLanes) {
      low = high = ranked_lanes<kAbsolute>(load(x));
      nan->see<0>(low, high);
    } else {
      load_ranked<kAbsolute>(x, &low, &high);
      nan->see<0>(low, high);
      reduce_pairs<kAbsolute, 1, kBlock / (2 * kFloatLanes)>(x, &low, &high, nan);
    }
    store(maxima_ + block * kFloatLanes, larger(low, high));
  }

  // Pairs kPair to kPairs - 1 of a block's vectors.
  template <bool kAbsolute, int kPair, int kPairs, class Stored>
  static void reduce_pairs(const Stored* x, FloatLanes* low, FloatLanes* high, NanSearch* nan) {
    if constexpr (kPair < kPairs) {
      FloatLanes p, q;
      load_ranked<kAbsolute>(x + kPair * 2 * kFloatLanes, &p, &q);
      nan->see<kPair>(p, q);
      *low = larger(p, *low);
      *high = larger(q, *high);
      reduce_pairs<kAbsolute, kPair + 1, kPairs>(x, low, high, nan);
    }
  }

  template <bool kAbsolute, class Stored>
  static void load_ranked(const Stored* x, FloatLanes* p, FloatLanes* q) {
    load_pair(x, p, q);
    keep_loaded(p, q);
    *p = ranked_lanes<kAbsolute>(*p);
    *q = ranked_lanes<kAbsolute>(*q);
  }

  // ---- from maxima to candidates ----

  // Appends the segment's candidates; raises the threshold first where the maxima prove a higher.
  template <bool kAbsolute, class Stored>
  void admit(const Stored* x, int64_t base, int64_t count) {
    if (bounded_ && count_above(maxima_, blocks_, threshold_) <= k_) {
      collect<kAbsolute, false>(x, count);
      return append_words<kAbsolute>(x, base);
    }
    const Bound bound = bound_of_maxima();
    if (bounded_ && float_of(bound.key) <= threshold_) {
      collect<kAbsolute, false>(x, count);
      return append_words<kAbsolute>(x, base);
    }
    threshold_ = float_of(bound.key);
    bounded_ = true;
    if (bound.at_least <= k_ + slack()) {
      collect<kAbsolute, true>(x, count);
      return append_words<kAbsolute>(x, base);
    }
    // Many equal maxima: what is above, and only as many ties as are missing.
    collect<kAbsolute, false>(x, count);
    int64_t missing = k_;
    for (int64_t w = 0; w < words_; ++w) missing -= __builtin_popcountll(hits_[w]);
    if (missing > 0) collect_with_ties<kAbsolute>(x, count, missing);
    append_words<kAbsolute>(x, base);
  }

  int64_t slack() const { return k_ / 8 + 2; }

  // A lower bound of the k-th largest element: of the maxima, merged to fewer groups first.
  Bound bound_of_maxima() const {
    alignas(kCacheLineBytes) int32_t keys[kGroupsPerK * kStreamedK + kFloatLanes];
    const int64_t wanted = (kGroupsPerK * k_ + kFloatLanes - 1) / kFloatLanes;
    const int64_t vectors = wanted < blocks_ ? wanted : blocks_;
    for (int64_t v = 0; v < vectors; ++v) {
      FloatLanes largest = load(maxima_ + v * kFloatLanes);
      for (int64_t b = v + vectors; b < blocks_; b += vectors) {
        largest = larger(load(maxima_ + b * kFloatLanes), largest);
      }
      const IntLanes lanes = keys_of(largest);
      std::memcpy(keys + v * kFloatLanes, &lanes, sizeof(lanes));
    }
    const int64_t merged = vectors * kFloatLanes;
    return bisect(keys, merged, k_, slack(), range_of(keys, merged));
  }

  // One bit for each element of the word at i that is > bound, or >= bound.
  template <bool kAbsolute, bool kInclusive, class Stored>
  static uint64_t compare_word(const Stored* x, int64_t i, int64_t count, float bound) {
    uint64_t hits = 0;
    if (i + kWord <= count) {
      return compare_64<kInclusive>([&](int v) { return ranked_lanes<kAbsolute>(load(x + i + v)); },
                                    broadcast(bound));
    }
    for (int64_t at = i; at < count; ++at) {
      const float value = ranked<kAbsolute>(to_sum(x[at]));
      const uint64_t hit = kInclusive ? value >= bound : value > bound;
      hits |= hit << (at - i);
    }
    return hits;
  }

  // Blocks are read again in units of at least one word.
  int64_t blocks_in_unit() const { return block_ < kWord ? kWord / block_ : 1; }

  // Whether the unit that starts with block `first` holds an element > threshold, or >= it.
  template <bool kInclusive>
  bool unit_reaches(int64_t first) const {
    const FloatLanes limit = broadcast(threshold_);
    const int64_t end = first + blocks_in_unit() < blocks_ ? first + blocks_in_unit() : blocks_;
    uint32_t reached = 0;
    for (int64_t b = first; b < end; ++b) {
      reached |= reaching<kInclusive>(load(maxima_ + b * kFloatLanes), limit);
    }
    return reached != 0;
  }

  // Writes the starts of the units that reach the threshold, and returns how many these are.
  template <bool kInclusive>
  int64_t choose_units(int32_t* chosen) const {
    const int64_t blocks = blocks_, block = block_;  // or each store would have them read again
    const FloatLanes limit = broadcast(threshold_);
    int64_t units = 0;
    if (blocks_in_unit() == 1) {
      for (int64_t b = 0; b < blocks; ++b) {
        chosen[units] = static_cast<int32_t>(b * block);
        units += reaching<kInclusive>(load(maxima_ + b * kFloatLanes), limit) != 0;
      }
      return units;
    }
    for (int64_t first = 0; first < blocks; first += blocks_in_unit()) {
      chosen[units] = static_cast<int32_t>(first * block);
      units += unit_reaches<kInclusive>(first);
    }
    return units;
  }

  // Notes the words with an element > threshold (>= when kInclusive).
  // Which blocks and words these are no branch predictor can guess, so there is no branch.
  template <bool kAbsolute, bool kInclusive, class Stored>
  void collect(const Stored* x, int64_t count) {
    int32_t chosen[kSegment / kWord + 1];
    const int64_t units = choose_units<kInclusive>(chosen);
    int64_t words = 0;
    const char* next = next_;
    const int64_t width = blocks_in_unit() * block_;
    for (int64_t c = 0; c < units; ++c) {
      const int64_t end = chosen[c] + width < count ? chosen[c] + width : count;
      for (int64_t i = chosen[c]; i < end; i += kWord) {
        for (int64_t byte = 0; byte < kBytesPerCompared; byte += kCacheLineBytes) {
          __builtin_prefetch(next + byte);
        }
        next += kBytesPerCompared;
        const uint64_t hits = compare_word<kAbsolute, kInclusive>(x, i, count, threshold_);
        hits_[words] = hits;
        starts_[words] = static_cast<int32_t>(i);
        words += hits != 0;
      }
    }
    words_ = words;
  }

  // The same for what is > threshold and the first `ties` elements equal to it.
  template <bool kAbsolute, class Stored>
  void collect_with_ties(const Stored* x, int64_t count, int64_t ties) {
    const int64_t width = blocks_in_unit() * block_;
    words_ = 0;
    for (int64_t first = 0; first < blocks_; first += blocks_in_unit()) {
      if (!(ties > 0 ? unit_reaches<true>(first) : unit_reaches<false>(first))) continue;
      const int64_t begin = first * block_, end = begin + width < count ? begin + width : count;
      for (int64_t i = begin; i < end; i += kWord) {
        uint64_t hits = compare_word<kAbsolute, false>(x, i, count, threshold_);
        uint64_t equal = compare_word<kAbsolute, true>(x, i, count, threshold_) & ~hits;
        for (; equal != 0 && ties > 0; --ties) {
          hits |= equal & -equal;
          equal &= equal - 1;
        }
        if (hits == 0) continue;
        hits_[words_] = hits;
        starts_[words_++] = static_cast<int32_t>(i);
      }
    }
  }

  // Appends the elements of the noted words. A tightening in between leaves some below the new
  // threshold to be appended, which the next one removes.
  template <bool kAbsolute, class Stored>
  void append_words(const Stored* x, int64_t base) {
    for (int64_t w = 0; w < words_; ++w) {
      if (count_ + kWord > kCapacity) tighten();
      uint64_t hits = hits_[w];
      do {
        const int64_t at = starts_[w] + __builtin_ctzll(hits);
        append(key_of(ranked<kAbsolute>(to_sum(x[at]))), base + at);
      } while ((hits &= hits - 1) != 0);
    }
  }

  int64_t k_, segment_, block_ = kLargestBlock;
  int64_t count_ = 0, blocks_ = 0, words_ = 0;
  const char* next_ = nullptr;  // what is fetched meanwhile
  bool bounded_ = false;        // whether threshold_ holds a bound
  float threshold_ = 0.0f;
  union {
    alignas(kCacheLineBytes) float maxima_[kMaximumGroups];
    alignas(kCacheLineBytes) int32_t keys_of_row_[kShortRow];
  };
  alignas(kCacheLineBytes) int32_t keys_[kCapacity + kFloatLanes];
  uint32_t indices_[kCapacity];
  uint64_t hits_[kSegment / kWord + 1];
  int32_t starts_[kSegment / kWord + 1];
};
static_assert(sizeof(Candidates) <= 36 << 10, "with 28 KiB of arrays on the stack 64 a thread");

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
