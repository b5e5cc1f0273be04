// The k-th key of a row by halving the interval that it lies in: the elements that reach its middle
// are counted where they lie, until the keys of those inside fit the L1 cache and are held there.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/topk/row.h"
#include "cpu/topk/words.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Rows so many times as long as what is held are sampled first, in so many vectors.
constexpr int64_t kSampledFrom = 2, kSampledVectors = 64;

// The k-th key of a row, and how many of its elements reach it.
template <bool kAbsolute, class Stored>
class Halving {
 public:
  using Key = typename Row<Stored>::Key;
  using Number = typename Sum<Stored>::Scalar;

  // `held` has room for kHeldKeys, and for one vector more.
  Halving(const Row<Stored>& row, Key* held) : x_(row.x), n_(row.n), k_(row.k), held_(held) {}

  // Nothing where the k-th is NaN.
  std::optional<Bound<Key>> find() {
    Range<Key> range = whole_range();
    int64_t at_low = n_, above = nan_;  // elements >= the interval's low, and > its high
    if (above >= k_) return std::nullopt;
    Range<Key> guess = n_ > kSampledFrom * kHeldKeys<Number> ? sampled_range() : range;
    while (range.low < range.high && at_low - above > kHeldKeys<Number>) {
      Key middle = range.middle();
      if (guess.low > range.low && guess.low <= range.high) {
        middle = guess.low;
        guess.low = range.low;  // each is tried once
      } else if (guess.high > range.low && guess.high < range.high) {
        middle = guess.high + 1;
        guess.high = range.low;
      }
      const int64_t at_middle = count_from(number_of(middle));
      if (at_middle >= k_) {
        range.low = middle;
        at_low = at_middle;
      } else {
        range.high = middle - 1;
        above = at_middle;
      }
    }
    if (range.low == range.high) return Bound<Key>{range.low, at_low};
    const int64_t count = hold(range);
    const Bound<Key> inside = bisect(held_, count, k_ - above, 0, range);
    return Bound<Key>{inside.key, above + inside.at_least};
  }

  // Writes the indices of the first k, ascending.
  void take(const Bound<Key>& bound, int64_t* indices) const {
    const Number limit = number_of(bound.key);
    if (bound.at_least == k_) {
      for (int64_t i = 0; i < n_; i += kWord) {
        const uint64_t bits = compare_word<kAbsolute, Comparison::kNotLess>(x_, i, n_, limit);
        indices = write_places(bits, i, indices);
      }
      return;
    }
    // ties are taken from the left: as many as are missing
    int64_t ties = k_ - count_above(limit);
    for (int64_t i = 0; i < n_; i += kWord) {
      uint64_t bits = compare_word<kAbsolute, Comparison::kNotLessEqual>(x_, i, n_, limit);
      uint64_t equal = compare_word<kAbsolute, Comparison::kNotLess>(x_, i, n_, limit) & ~bits;
      for (; equal != 0 && ties > 0; --ties) {
        bits |= equal & -equal;
        equal &= equal - 1;
      }
      indices = write_places(bits, i, indices);
    }
  }

 private:
  using Lanes = typename Sum<Stored>::Lanes;
  static constexpr int64_t kLanes = Sum<Stored>::kLanes;

  static int64_t* write_places(uint64_t bits, int64_t begin, int64_t* indices) {
    for (; bits != 0; bits &= bits - 1) *indices++ = begin + __builtin_ctzll(bits);
    return indices;
  }

  // From -inf to the largest that is no NaN; counts these.
  Range<Key> whole_range() {
    const Lanes none = broadcast(-std::numeric_limits<Number>::infinity());
    Lanes even = none, odd = none;
    NanSearch<Lanes> nan;
    int64_t i = 0;
    for (; i + 2 * kLanes <= n_; i += 2 * kLanes) {
      const Lanes a = compared_lanes<kAbsolute>(load(x_ + i));
      const Lanes b = compared_lanes<kAbsolute>(load(x_ + i + kLanes));
      nan.template see<0>(a, b);
      even = larger(a, even);  // the second one, if the first is NaN
      odd = larger(b, odd);
    }
    for (; i < n_; i += kLanes) {
      const Lanes a = load_existing<kAbsolute>(x_, i, n_);
      nan.template see<1>(a, a);
      even = larger(a, even);
    }
    nan_ = nan.found() ? count_above(std::numeric_limits<Number>::infinity()) : 0;
    return {key_of(none[0]), key_of(largest_lane(larger(even, odd)))};
  }

  // An interval of keys that holds the k-th of most rows: what is next to its place in a sample of
  // vectors at equal distances.
  Range<Key> sampled_range() const {
    constexpr int64_t kSample = kSampledVectors * kLanes;
    const int64_t distance = n_ / kSample * kLanes;
    for (int64_t v = 0; v < kSampledVectors; ++v) {
      const auto keys = keys_of(compared_lanes<kAbsolute>(load(x_ + v * distance)));
      std::memcpy(held_ + v * kLanes, &keys, sizeof(keys));
    }
    const double place = static_cast<double>(k_) * kSample / static_cast<double>(n_);
    const double margin = 2 + 2 * std::sqrt(place);
    const auto key_at_place = [&](double wanted) {
      const auto place_inside =
          static_cast<int64_t>(std::min(std::max(wanted, 1.0), static_cast<double>(kSample)));
      return bisect(held_, kSample, place_inside, 0, range_of(held_, kSample)).key;
    };
    return {key_at_place(place + margin), key_at_place(place - margin)};
  }

  template <Comparison kHow>
  int64_t count(Number bound) const {
    const Lanes limit = broadcast(bound);
    const int64_t whole = n_ / kLanes * kLanes;
    int64_t sum = count_reaching<kHow>(
        [&](int64_t i) { return compared_lanes<kAbsolute>(load(x_ + i)); }, whole, limit);
    if (whole < n_) {  // lanes past the end are -inf, which no bound that is asked for counts
      sum += __builtin_popcount(reaching<kHow>(load_existing<kAbsolute>(x_, whole, n_), limit));
    }
    return sum;
  }
  // bound > -inf
  int64_t count_from(Number bound) const { return count<Comparison::kNotLess>(bound); }
  int64_t count_above(Number bound) const { return count<Comparison::kNotLessEqual>(bound); }

  // The keys inside the interval -> held_, padded; returns how many.
  int64_t hold(const Range<Key>& range) const {
    // -1 is the key of -0, which no element has: as a number it would be equal to those with key 0.
    const Key highest = range.high == -1 ? -2 : range.high;
    const Lanes low = broadcast(number_of(range.low)), high = broadcast(number_of(highest));
    int64_t count = 0;
    for (int64_t i = 0; i < n_; i += kLanes) {
      const Lanes lanes = load_existing<kAbsolute>(x_, i, n_);
      uint32_t inside = reaching<Comparison::kGreaterEqual>(lanes, low) &
                        ~reaching<Comparison::kGreater>(lanes, high);
      if (i + kLanes > n_) inside &= (1u << (n_ - i)) - 1;
      count += store_chosen(held_ + count, keys_of(lanes), inside);
    }
    pad(held_, count);
    return count;
  }

  const Stored* x_;
  int64_t n_, k_, nan_ = 0;
  Key* held_;
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
