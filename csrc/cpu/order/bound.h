// Lower bounds of the k-th largest of few keys, by bisection over their range.
#pragma once

#include "cpu/order/keys.h"
#include "cpu/simd/comparisons.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

inline IntLanes load_keys(const int32_t* p) {
  IntLanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// How many of keys[0..count) are >= bound. The array is padded to whole vectors with INT32_MIN.
inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  const IntLanes limit = broadcast(bound);
#if defined(__AVX512F__)  // popcnt of a mask beats a sum over lanes for the few vectors of a
                          // typical call
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    sum +=
        __builtin_popcount(_mm512_cmpge_epi32_mask((__m512i)load_keys(keys + i), (__m512i)limit));
  }
  return sum;
#else
  IntLanes total = {};
  for (int64_t i = 0; i < count; i += kFloatLanes)
    total -= (IntLanes)(load_keys(keys + i) >= limit);
  return sum_lanes(total);
#endif
}

// How many of x[0..vectors * kFloatLanes) are > bound; none is NaN.
inline int64_t count_above(const float* x, int64_t vectors, float bound) {
  const FloatLanes limit = broadcast(bound);
#if defined(__AVX512F__)
  int64_t sum = 0;
  for (int64_t v = 0; v < vectors; ++v)
    sum += __builtin_popcount(greater(load(x + v * kFloatLanes), limit));
  return sum;
#else
  IntLanes total = {};
  for (int64_t v = 0; v < vectors; ++v) total -= (IntLanes)(load(x + v * kFloatLanes) > limit);
  return sum_lanes(total);
#endif
}

// A lower bound of the wanted-th largest key, found by bisection.
struct Bound {
  int32_t key;       // at least `wanted` keys are >= key
  int64_t at_least;  // how many
};

struct Range {
  int32_t low, high;
};

inline Range range_of(const int32_t* keys, int64_t count) {
  int32_t low = keys[0], high = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  return {low, high};
}

// Stops early as soon as no more than wanted + slack keys are >= the bound.
inline Bound bisect(const int32_t* keys, int64_t count, int64_t wanted, int64_t slack,
                    Range range) {
  int32_t low = range.low, high = range.high;
  int64_t at_low = count_at_least(keys, count, low);
  while (low < high && at_low > wanted + slack) {
    // rounded up, so that the interval shrinks; in 64 bits, since high - low may overflow
    const int32_t middle =
        static_cast<int32_t>(low + ((static_cast<int64_t>(high) - low + 1) >> 1));
    const int64_t at_middle = count_at_least(keys, count, middle);
    if (at_middle >= wanted) {
      low = middle;
      at_low = at_middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, at_low};
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
