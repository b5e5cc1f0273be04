// The total order on values as integer keys, and comparisons of whole vectors as bit masks.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

using IntLanes = int32_t __attribute__((vector_size(kLaneBytes)));

// ---- keys: a > b in the order of values exactly when key(a) > key(b) ----

// float -> int32 with -0 as +0 and every NaN above +inf.
inline int32_t key_of(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);  // -0 + 0 is +0
  return x != x ? std::numeric_limits<int32_t>::max() : bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int64_t key_of(double x) {
  const int64_t bits = bit_cast<int64_t>(x + 0.0);
  return x != x ? std::numeric_limits<int64_t>::max() : bits ^ ((bits >> 63) & INT64_MAX);
}
inline IntLanes keys_of(FloatLanes x) {
  const IntLanes bits = (IntLanes)(x + FloatLanes{});
  const IntLanes unordered = (IntLanes)(x != x);
  const IntLanes ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return (unordered & 0x7fffffff) | (~unordered & ordered);
}
// The float whose key it is; key lies between those of -inf and +inf.
inline float float_of(int32_t key) { return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

template <bool kAbsolute, class T>
inline T ranked(T x) {  // the value that is compared
  return kAbsolute && x < 0 ? -x : x;
}
template <bool kAbsolute>
inline FloatLanes ranked_lanes(FloatLanes x) {
  if constexpr (kAbsolute) return (FloatLanes)((IntLanes)x & 0x7fffffff);
  return x;
}

// ---- one bit per lane ----

inline uint32_t bits_of(IntLanes comparison) {  // lanes are 0 or -1
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)comparison);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)comparison));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)comparison));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kFloatLanes; ++lane) bits |= (comparison[lane] & 1u) << lane;
  return bits;
#endif
}
#if defined(__AVX512F__)
inline uint32_t greater(FloatLanes a, FloatLanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline uint32_t greater_equal(FloatLanes a, FloatLanes b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
inline uint32_t equal(FloatLanes a, FloatLanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline uint32_t greater(IntLanes a, IntLanes b) {
  return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
}
inline uint32_t greater_equal(IntLanes a, IntLanes b) {
  return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b);
}
inline uint32_t equal(IntLanes a, IntLanes b) {
  return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
}
#else
inline uint32_t greater(FloatLanes a, FloatLanes b) { return bits_of((IntLanes)(a > b)); }
inline uint32_t greater_equal(FloatLanes a, FloatLanes b) { return bits_of((IntLanes)(a >= b)); }
inline uint32_t equal(FloatLanes a, FloatLanes b) { return bits_of((IntLanes)(a == b)); }
inline uint32_t greater(IntLanes a, IntLanes b) { return bits_of(a > b); }
inline uint32_t equal(IntLanes a, IntLanes b) { return bits_of(a == b); }
#endif

// Where a or b is NaN, gathered over many pairs and asked for once.
#if defined(__AVX512F__)
using NanLanes = __mmask16;
inline NanLanes unordered(FloatLanes a, FloatLanes b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
}
inline bool any(NanLanes nan) { return nan != 0; }
#else
using NanLanes = IntLanes;
inline NanLanes unordered(FloatLanes a, FloatLanes b) {
#if defined(__AVX2__)
  return (IntLanes)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
#elif defined(__SSE2__)
  return (IntLanes)_mm_cmpunord_ps((__m128)a, (__m128)b);
#else
  return (IntLanes)(a != a) | (IntLanes)(b != b);
#endif
}
inline bool any(NanLanes nan) { return bits_of(nan) != 0; }
#endif

// The larger of each lane; no lane is NaN.
inline FloatLanes larger(FloatLanes a, FloatLanes b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline IntLanes broadcast(int32_t x) { return x - IntLanes{}; }
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

// The place of keys[i] among keys[0..count), largest first, equal ones in the order of their place.
// The array is padded to whole vectors with INT32_MIN.
inline int64_t rank_of(const int32_t* keys, int64_t count, int64_t i) {
  const IntLanes key = broadcast(keys[i]);
  const int64_t own = i / kFloatLanes * kFloatLanes;
  const IntLanes mine = load_keys(keys + own);
#if defined(__AVX512F__)
  const uint32_t before = (1u << (i - own)) - 1;
  int64_t rank = __builtin_popcount(greater(mine, key) | (equal(mine, key) & before));
  for (int64_t j = 0; j < own; j += kFloatLanes)
    rank += __builtin_popcount(greater_equal(load_keys(keys + j), key));
  for (int64_t j = own + kFloatLanes; j < count; j += kFloatLanes)
    rank += __builtin_popcount(greater(load_keys(keys + j), key));
  return rank;
#else
  IntLanes lane;
  for (int l = 0; l < kFloatLanes; ++l) lane[l] = l;
  const IntLanes before = lane < broadcast(static_cast<int32_t>(i - own));
  IntLanes total = -((mine > key) | ((mine == key) & before));
  for (int64_t j = 0; j < own; j += kFloatLanes) total -= load_keys(keys + j) >= key;
  for (int64_t j = own + kFloatLanes; j < count; j += kFloatLanes)
    total -= load_keys(keys + j) > key;
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
