// The maxima of a segment's groups, a lower bound from them, and where elements reach a bound.
//
// A segment is dealt to blocks of neighbouring vectors; each lane of each block is a group. Only
// blocks whose maxima reach the bound are read again, from the cache.
#pragma once

#include "cpu/order/bound.h"
#include "cpu/topk/regimes.h"
#include "cpu/topk/words.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

constexpr int64_t kLargestBlock = 4 * kWord;

// A segment is read from two places at once, and each is fetched ahead: hardware prefetchers stop
// at the end of a page, and memory serves several places better than one. While the candidates
// are collected from the cache, memory goes on with the next segment. Measured on (256, 32768)
// float32 out of the caches, two threads: Zen 5 0.75 ms without fetching, 0.63 with it, for any
// number of places; on Cascade Lake a plain read took 2.2 ms without, 1.8 with one place and 1.4
// with four.
constexpr int64_t kPlaces = 2;
constexpr int64_t kBytesAhead = 8192;       // at each place
constexpr int64_t kBytesPerCompared = 256;  // fetched while a word is compared

constexpr int64_t kMostWords = kSegment<float> / kWord + 1;  // of a segment

// The words of a segment that hold elements beyond a bound: where each starts, and a bit for each
// such element.
struct Hits {
  int64_t words = 0;
  uint64_t bits[kMostWords];
  int32_t starts[kMostWords];

  int64_t count() const {
    int64_t sum = 0;
    for (int64_t w = 0; w < words; ++w) sum += __builtin_popcountll(bits[w]);
    return sum;
  }
};

// `Number` is what elements are compared as: float or double.
template <class Number>
class SegmentMaxima {
 public:
  using Key = typename Sum<Number>::Integer;
  using Lanes = typename Sum<Number>::Lanes;

  // For rows of n elements, of which k <= kCandidateK are wanted. The larger its blocks, the faster
  // a segment is reduced; the smaller, the fewer elements are read again.
  SegmentMaxima(int64_t n, int64_t k) {
    const int64_t segments = (n + kSegment<Number> - 1) / kSegment<Number>;
    segment_ = (n + segments - 1) / segments;
    segment_ = (segment_ + kLargestBlock - 1) / kLargestBlock * kLargestBlock;
    const int64_t first = n < segment_ ? n : segment_;
    while (block_ > kWord && (groups(first, block_) < kGroupsPerK * k || first < 2 * k * block_) &&
           groups(first, block_ / 2) <= kMaximumGroups<Number>) {
      block_ /= 2;
    }
    if (groups(first, block_) < 2 * k) block_ = kSmallestBlock;
  }

  int64_t segment() const { return segment_; }  // elements, at most
  Key* held_keys() { return held_keys_; }       // room for kHeldKeys; no reading meanwhile

  // ---- one pass over the segment: the maxima of its groups ----

  // Reduces x[0..count), count <= segment(). What lies `ahead` elements further is fetched
  // meanwhile; it need not exist. Returns false when the segment holds a NaN.
  template <bool kAbsolute, class Stored>
  bool reduce(const Stored* x, int64_t count, int64_t ahead) {
    next_ = reinterpret_cast<const char*>(x + ahead) + kBytesAhead;
    if (block_ == kLargestBlock) return reduce<kAbsolute, kLargestBlock>(x, count, ahead);
    if (block_ == kLargestBlock / 2) return reduce<kAbsolute, kLargestBlock / 2>(x, count, ahead);
    if (block_ == kWord) return reduce<kAbsolute, kWord>(x, count, ahead);
    return reduce<kAbsolute, kSmallestBlock>(x, count, ahead);
  }

  // ---- a lower bound ----

  // How many groups hold an element > bound.
  int64_t groups_above(Number bound) const {
    return count_reaching<Comparison::kGreater>([&](int64_t i) { return load(maxima_ + i); },
                                                blocks_ * kLanes, broadcast(bound));
  }

  // A lower bound of the k-th largest element: of the maxima, merged to fewer groups first. No more
  // than k + slack merged groups reach it, unless maxima are equal.
  Bound<Key> bound_for(int64_t k, int64_t slack) const {
    alignas(kCacheLineBytes) Key keys[kGroupsPerK * kCandidateK<Number> + kLanes];
    const int64_t wanted = (kGroupsPerK * k + kLanes - 1) / kLanes;
    const int64_t vectors = wanted < blocks_ ? wanted : blocks_;
    for (int64_t v = 0; v < vectors; ++v) {
      Lanes largest = load(maxima_ + v * kLanes);
      for (int64_t b = v + vectors; b < blocks_; b += vectors) {
        largest = larger(load(maxima_ + b * kLanes), largest);
      }
      const auto lanes = keys_of(largest);
      std::memcpy(keys + v * kLanes, &lanes, sizeof(lanes));
    }
    const int64_t merged = vectors * kLanes;
    return bisect(keys, merged, k, slack, range_of(keys, merged));
  }

  // ---- the elements that reach a bound ----

  // Notes the words with an element > bound (>= when kInclusive).
  // Which blocks and words these are no branch predictor can guess, so there is no branch.
  template <bool kAbsolute, bool kInclusive, class Stored>
  void collect(const Stored* x, int64_t count, Number bound, Hits* hits) const {
    int32_t chosen[kMostWords];
    const int64_t units = choose_units<kInclusive>(bound, chosen);
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
        const uint64_t bits = compare_word<kAbsolute, how<kInclusive>>(x, i, count, bound);
        hits->bits[words] = bits;
        hits->starts[words] = static_cast<int32_t>(i);
        words += bits != 0;
      }
    }
    hits->words = words;
  }

  // The same for what is > bound and the first `ties` elements equal to it.
  template <bool kAbsolute, class Stored>
  void collect_with_ties(const Stored* x, int64_t count, Number bound, int64_t ties,
                         Hits* hits) const {
    const int64_t width = blocks_in_unit() * block_;
    hits->words = 0;
    for (int64_t first = 0; first < blocks_; first += blocks_in_unit()) {
      if (!(ties > 0 ? unit_reaches<true>(first, bound) : unit_reaches<false>(first, bound))) {
        continue;
      }
      const int64_t begin = first * block_, end = begin + width < count ? begin + width : count;
      for (int64_t i = begin; i < end; i += kWord) {
        uint64_t bits = compare_word<kAbsolute, how<false>>(x, i, count, bound);
        uint64_t equal = compare_word<kAbsolute, how<true>>(x, i, count, bound) & ~bits;
        for (; equal != 0 && ties > 0; --ties) {
          bits |= equal & -equal;
          equal &= equal - 1;
        }
        if (bits == 0) continue;
        hits->bits[hits->words] = bits;
        hits->starts[hits->words++] = static_cast<int32_t>(i);
      }
    }
  }

 private:
  static constexpr int64_t kLanes = Sum<Number>::kLanes;
  template <bool kInclusive>
  static constexpr Comparison how = kInclusive ? Comparison::kGreaterEqual : Comparison::kGreater;

  static int64_t groups(int64_t count, int64_t block) { return groups_of<Number>(count, block); }

  template <bool kAbsolute, int64_t kBlock, class Stored>
  bool reduce(const Stored* x, int64_t count, int64_t ahead) {
    constexpr int64_t kSize = sizeof(Stored);
    constexpr int64_t kBlocksAhead = kBytesAhead / (kBlock * kSize);
    const int64_t whole = count / kBlock, part = whole / kPlaces;
    NanSearch<Lanes> nan;
    for (int64_t i = 0; i < part; ++i) {
      // past the end of a part comes its continuation in the next segment
      const int64_t later = i + kBlocksAhead;
      const Stored* next = x + (later < part ? later * kBlock : (later - part) * kBlock + ahead);
      for (int64_t s = 0; s < kPlaces; ++s) {
        const int64_t block = s * part + i;
        for (int64_t byte = 0; byte < kBlock * kSize; byte += kCacheLineBytes) {
          __builtin_prefetch(reinterpret_cast<const char*>(next + s * part * kBlock) + byte);
        }
        reduce_block<kAbsolute, kBlock>(x, block, &nan);
      }
    }
    for (int64_t block = kPlaces * part; block < whole; ++block) {
      reduce_block<kAbsolute, kBlock>(x, block, &nan);
    }
    blocks_ = whole;
    if (whole * kBlock < count) {  // one more block, in part
      Lanes largest = broadcast(-std::numeric_limits<Number>::infinity());
      for (int64_t i = whole * kBlock; i < count; i += kLanes) {
        const Lanes lanes = load_existing<kAbsolute>(x, i, count);
        nan.template see<0>(lanes, lanes);
        largest = larger(lanes, largest);
      }
      store(maxima_ + blocks_++ * kLanes, largest);
    }
    return !nan.found();
  }

  template <bool kAbsolute, int64_t kBlock, class Stored>
  void reduce_block(const Stored* x, int64_t block, NanSearch<Lanes>* nan) {
    Lanes low, high;
    x += block * kBlock;
    if constexpr (kBlock == kLanes) {
      low = high = compared_lanes<kAbsolute>(load(x));
      nan->template see<0>(low, high);
    } else {
      load_compared<kAbsolute>(x, &low, &high);
      nan->template see<0>(low, high);
      reduce_pairs<kAbsolute, 1, kBlock / (2 * kLanes)>(x, &low, &high, nan);
    }
    store(maxima_ + block * kLanes, larger(low, high));
  }

  // Pairs kPair to kPairs - 1 of a block's vectors.
  template <bool kAbsolute, int kPair, int kPairs, class Stored>
  static void reduce_pairs(const Stored* x, Lanes* low, Lanes* high, NanSearch<Lanes>* nan) {
    if constexpr (kPair < kPairs) {
      Lanes p, q;
      load_compared<kAbsolute>(x + kPair * 2 * kLanes, &p, &q);
      nan->template see<kPair>(p, q);
      *low = larger(p, *low);
      *high = larger(q, *high);
      reduce_pairs<kAbsolute, kPair + 1, kPairs>(x, low, high, nan);
    }
  }

  template <bool kAbsolute, class Stored>
  static void load_compared(const Stored* x, Lanes* p, Lanes* q) {
    load_pair(x, p, q);
    keep_loaded(p, q);
    *p = compared_lanes<kAbsolute>(*p);
    *q = compared_lanes<kAbsolute>(*q);
  }

  // Blocks are read again in units of at least one word.
  int64_t blocks_in_unit() const { return block_ < kWord ? kWord / block_ : 1; }

  // Whether the unit that starts with block `first` holds an element > bound, or >= it.
  template <bool kInclusive>
  bool unit_reaches(int64_t first, Number bound) const {
    const Lanes limit = broadcast(bound);
    const int64_t end = first + blocks_in_unit() < blocks_ ? first + blocks_in_unit() : blocks_;
    uint32_t reached = 0;
    for (int64_t b = first; b < end; ++b) {
      reached |= reaching<how<kInclusive>>(load(maxima_ + b * kLanes), limit);
    }
    return reached != 0;
  }

  // Writes the starts of the units that reach the bound, and returns how many these are.
  template <bool kInclusive>
  int64_t choose_units(Number bound, int32_t* chosen) const {
    const int64_t blocks = blocks_, block = block_;  // or each store would have them read again
    const Lanes limit = broadcast(bound);
    int64_t units = 0;
    if (blocks_in_unit() == 1) {
      for (int64_t b = 0; b < blocks; ++b) {
        chosen[units] = static_cast<int32_t>(b * block);
        units += reaching<how<kInclusive>>(load(maxima_ + b * kLanes), limit) != 0;
      }
      return units;
    }
    for (int64_t first = 0; first < blocks; first += blocks_in_unit()) {
      chosen[units] = static_cast<int32_t>(first * block);
      units += unit_reaches<kInclusive>(first, bound);
    }
    return units;
  }

  int64_t segment_, block_ = kLargestBlock, blocks_ = 0;
  const char* next_ = nullptr;  // what is fetched while elements are collected
  union {
    alignas(kCacheLineBytes) Number maxima_[kMaximumGroups<Number>];
    alignas(kCacheLineBytes) Key held_keys_[kHeldKeys<Number> + kLanes];
  };
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
