// The maxima of a segment's groups, a lower bound from them, and where elements reach a bound.
//
// A segment is dealt to blocks of neighbouring vectors; each lane of each block is a group. Only
// blocks whose maxima reach the bound are read again, from the cache.
#pragma once

#include <type_traits>

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
// Words that are chosen at most: a block more may be written than there are.
constexpr int64_t kMostChosen = kMostWords + 2 * kLargestBlock / kWord;

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
    int32_t chosen[kMostChosen];
    const int64_t words = choose_words<kInclusive>(count, bound, chosen);
    const int64_t whole = words - (words > 0 && chosen[words - 1] + kWord > count);
    const Lanes limit = broadcast(bound);
    const char* next = next_;
    int64_t noted = 0;
    for (int64_t w = 0; w < whole; ++w) {
      for (int64_t byte = 0; byte < kBytesPerCompared; byte += kCacheLineBytes) {
        __builtin_prefetch(next + byte);
      }
      next += kBytesPerCompared;
      const Stored* word = x + chosen[w];
      const uint64_t bits = compare_64<how<kInclusive>>(
          [&](int v) { return compared_lanes<kAbsolute>(load(word + v)); }, limit);
      hits->bits[noted] = bits;
      hits->starts[noted] = chosen[w];
      noted += bits != 0;
    }
    if (whole < words) {
      hits->bits[noted] = compare_word<kAbsolute, how<kInclusive>>(x, chosen[whole], count, bound);
      hits->starts[noted] = chosen[whole];
      noted += hits->bits[noted] != 0;
    }
    hits->words = noted;
  }

  // The same for what is > bound and the first `ties` elements equal to it.
  template <bool kAbsolute, class Stored>
  void collect_with_ties(const Stored* x, int64_t count, Number bound, int64_t ties,
                         Hits* hits) const {
    int32_t chosen[kMostChosen];
    int64_t words = choose_words<true>(count, bound, chosen);
    int64_t begin = 0;  // elements before it are done
    hits->words = 0;
    const auto note = [&](int64_t i, uint64_t bits) {
      hits->bits[hits->words] = bits;
      hits->starts[hits->words] = static_cast<int32_t>(i);
      hits->words += bits != 0;
    };
    for (int64_t w = 0; w < words && ties > 0; ++w) {
      uint64_t bits = compare_word<kAbsolute, how<false>>(x, chosen[w], count, bound);
      uint64_t equal = compare_word<kAbsolute, how<true>>(x, chosen[w], count, bound) & ~bits;
      for (; equal != 0 && ties > 0; --ties) {
        bits |= equal & -equal;
        equal &= equal - 1;
      }
      note(chosen[w], bits);
      begin = chosen[w] + kWord;
    }
    words = choose_words<false>(count, bound, chosen);
    for (int64_t w = 0; w < words; ++w) {
      if (chosen[w] < begin) continue;
      note(chosen[w], compare_word<kAbsolute, how<false>>(x, chosen[w], count, bound));
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

  // Writes the starts of the words whose blocks reach the bound, and returns how many these are. A
  // block is at least one word, or a word is several blocks.
  template <bool kInclusive>
  int64_t choose_words(int64_t count, Number bound, int32_t* chosen) const {
    const int64_t blocks = blocks_, block = block_;  // or each store would have them read again
    const Lanes limit = broadcast(bound);
    const auto reached = [&](int64_t b) {
      return reaching<how<kInclusive>>(load(maxima_ + b * kLanes), limit);
    };
    int64_t words = 0;
    if (block < kWord) {
      const int64_t blocks_of_word = kWord / block;
      for (int64_t first = 0; first < blocks; first += blocks_of_word) {
        uint32_t any = 0;
        for (int64_t b = first; b < first + blocks_of_word && b < blocks; ++b) any |= reached(b);
        chosen[words] = static_cast<int32_t>(first * block);
        words += any != 0;
      }
      return words;
    }
    const auto choose = [&](auto words_of_block) {
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t w = 0; w < words_of_block; ++w) {
          chosen[words + w] = static_cast<int32_t>((b * words_of_block + w) * kWord);
        }
        words += reached(b) != 0 ? words_of_block : 0;
      }
    };
    if (block == kWord) choose(std::integral_constant<int64_t, 1>());
    if (block == 2 * kWord) choose(std::integral_constant<int64_t, 2>());
    if (block == 4 * kWord) choose(std::integral_constant<int64_t, 4>());
    while (words > 0 && chosen[words - 1] >= count) --words;  // the last block is partial
    return words;
  }

  int64_t segment_, block_ = kLargestBlock, blocks_ = 0;
  const char* next_ = nullptr;  // what is fetched while elements are collected
  union {
    alignas(kCacheLineBytes) Number maxima_[kMaximumGroups<Number>];
    alignas(kCacheLineBytes) Key held_keys_[kHeldKeys<Number> + kLanes];
  };
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
