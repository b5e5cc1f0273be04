// Lower bounds of the k-th largest of few keys, by bisection over their range.
#pragma once

#include <limits>

#include "cpu/order/keys.h"
#include "cpu/simd/comparisons.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

inline IntLanes load_keys(const int32_t* p) {
  IntLanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline LongLanes load_keys(const int64_t* p) {
  LongLanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// Keys in a vector.
template <class Key>
constexpr int kKeyLanes = kLaneBytes / static_cast<int>(sizeof(Key));

// Below all keys, also by one: what arrays of keys are padded with, to whole vectors.
template <class Key>
constexpr Key kPadding = std::numeric_limits<Key>::min() + 1;

template <class Key>
inline void pad(Key* keys, int64_t count) {
  for (; count % kKeyLanes<Key> != 0; ++count) keys[count] = kPadding<Key>;
}

// How many of the keys in [0, count), or of those numbers, reach the bound. Arrays of keys are
// padded; load_at(i) loads element i and those after it.
template <Comparison kHow, class LoadAt, class Lanes>
inline int64_t count_reaching(const LoadAt& load_at, int64_t count, Lanes bound) {
  constexpr int64_t kLanes = sizeof(Lanes) / sizeof(bound[0]);
#if defined(__AVX512F__)  // popcnt of a mask beats a sum over lanes for the few vectors of a
                          // typical call
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    sum += __builtin_popcount(reaching<kHow>(load_at(i), bound));
  }
  return sum;
#else
  decltype(bound > bound) total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    total = count_reaching<kHow>(total, load_at(i), bound);
  }
  return sum_lanes(total);
#endif
}
template <class Key>
inline int64_t count_at_least(const Key* keys, int64_t count, Key bound) {
  return count_reaching<Comparison::kGreaterEqual>([&](int64_t i) { return load_keys(keys + i); },
                                                   count, broadcast(bound));
}

// A lower bound of the wanted-th largest key, found by bisection.
template <class Key>
struct Bound {
  Key key;           // at least `wanted` keys are >= key
  int64_t at_least;  // how many
};

template <class Key>
struct Range {
  Key low, high;

  // Between them, rounded up, so that an interval shrinks; computed without a sign, since
  // high - low may overflow.
  Key middle() const {
    using Unsigned = std::make_unsigned_t<Key>;
    const Unsigned width = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    return static_cast<Key>(static_cast<Unsigned>(low) + (width >> 1) + (width & 1));
  }
};

template <class Key>
inline Range<Key> range_of(const Key* keys, int64_t count) {
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  return {low, high};
}

// Stops early as soon as no more than wanted + slack keys are >= the bound.
template <class Key>
inline Bound<Key> bisect(const Key* keys, int64_t count, int64_t wanted, int64_t slack,
                         Range<Key> range) {
  int64_t at_low = count_at_least(keys, count, range.low);
  while (range.low < range.high && at_low > wanted + slack) {
    const Key middle = range.middle();
    const int64_t at_middle = count_at_least(keys, count, middle);
    if (at_middle >= wanted) {
      range.low = middle;
      at_low = at_middle;
    } else {
      range.high = middle - 1;
    }
  }
  return {range.low, at_low};
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
