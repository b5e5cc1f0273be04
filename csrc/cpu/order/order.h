// The total order on values as integer keys, and comparisons of whole vectors as bit masks.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/simd/lanes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

using IntLanes = int32_t __attribute__((vector_size(kLaneBytes)));

// ---- keys: a > b in the order of values exactly when key(a) > key(b) ----

// float -> int32 with -0 as +0 and every NaN above +inf.
inline int32_t key_of(float x) {
  int32_t bits = bit_cast<int32_t>(x);
  bits = bits == INT32_MIN ? 0 : bits;
  return x != x ? std::numeric_limits<int32_t>::max() : bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int64_t key_of(double x) {
  int64_t bits = bit_cast<int64_t>(x);
  bits = bits == INT64_MIN ? 0 : bits;
  return x != x ? std::numeric_limits<int64_t>::max() : bits ^ ((bits >> 63) & INT64_MAX);
}
inline IntLanes keys_of(FloatLanes x) {
  const IntLanes signed_zero = (IntLanes)x == INT32_MIN;
  const IntLanes bits = (IntLanes)x & ~signed_zero;
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
#endif

// One bit per lane: whether it is > bound, or >= bound when kInclusive.
template <bool kInclusive>
inline uint32_t reaching(FloatLanes x, FloatLanes bound) {
  return kInclusive ? greater_equal(x, bound) : greater(x, bound);
}

// The same for 64 elements; load_at(i) loads elements i to i + kFloatLanes - 1.
template <bool kInclusive, class LoadAt>
inline uint64_t compare_64(const LoadAt& load_at, FloatLanes bound) {
#if defined(__AVX512F__)  // joined as masks: one move to a general register instead of four
  const uint32_t a = reaching<kInclusive>(load_at(0), bound);
  const uint32_t b = reaching<kInclusive>(load_at(16), bound);
  const uint32_t c = reaching<kInclusive>(load_at(32), bound);
  const uint32_t d = reaching<kInclusive>(load_at(48), bound);
  return _mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a));
#else
  uint64_t hits = 0;
  for (int i = 0; i < 64; i += kFloatLanes) {
    hits |= uint64_t{reaching<kInclusive>(load_at(i), bound)} << i;
  }
  return hits;
#endif
}

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

// ---- a NaN among many vectors ----

// Keeps loaded vectors in their registers: the compiler would load them again for a second use.
// With SSE, whose instructions overwrite an operand, that is quicker.
inline void keep_loaded(FloatLanes* a, FloatLanes* b) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(*a), "+v"(*b));
#elif defined(__AVX2__)
  __asm__("" : "+x"(*a), "+x"(*b));
#else
  (void)a, (void)b;
#endif
}

// Whether a lane of the vectors that it saw is NaN. Measured on Zen 5 with AVX-512, in the caches:
// a row is reduced 1.6 times as fast as with a disjunction of masks, which GCC makes in memory.
class NanSearch {
 public:
  // Neighbouring pairs of vectors in neighbouring slots do not wait for one another.
  template <int kSlot>
  void see(FloatLanes a, FloatLanes b) {
#if defined(__AVX512F__)  // a comparison under a mask is a conjunction
    __mmask16& ordered = ordered_[kSlot % kSlots];
    ordered = _mm512_mask_cmp_ps_mask(ordered, a, b, _CMP_ORD_Q);
#elif defined(__AVX2__)
    unordered_ |= (IntLanes)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
#elif defined(__SSE2__)
    unordered_ |= (IntLanes)_mm_cmpunord_ps((__m128)a, (__m128)b);
#else
    unordered_ |= (IntLanes)(a != a) | (IntLanes)(b != b);
#endif
  }

  bool found() const {
#if defined(__AVX512F__)
    return (ordered_[0] & ordered_[1] & ordered_[2] & ordered_[3]) != kAllLanes;
#else
    return bits_of(unordered_) != 0;
#endif
  }

 private:
#if defined(__AVX512F__)
  static constexpr int kSlots = 4;
  __mmask16 ordered_[kSlots] = {kAllLanes, kAllLanes, kAllLanes, kAllLanes};
#else
  IntLanes unordered_ = {};
#endif
};

// ---- the order of few keys ----

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

// items[0..count) -> ordered, by their keys: largest first, equal ones in the order of their place.
// Every pair is compared, so there are no branches to guess; good for few. The array of keys is
// padded to whole vectors with INT32_MIN.
inline void rank_by_pairs(const int32_t* keys, const uint32_t* items, int64_t count,
                          int64_t* ordered) {
#if !defined(__AVX512F__)
  IntLanes lane;
  for (int l = 0; l < kFloatLanes; ++l) lane[l] = l;
#endif
  for (int64_t own = 0; own < count; own += kFloatLanes) {  // the vector that holds key i
    const IntLanes mine = load_keys(keys + own);
    const int64_t end = own + kFloatLanes < count ? own + kFloatLanes : count;
#if defined(__AVX512F__)
    uint32_t before = 0;  // a bit for each key of the vector that comes before key i
#endif
    for (int64_t i = own; i < end; ++i) {
      const IntLanes key = broadcast(keys[i]);
#if defined(__AVX512F__)
      int64_t rank = __builtin_popcount(greater(mine, key) | (equal(mine, key) & before));
      before = 2 * before + 1;
      for (int64_t j = 0; j < own; j += kFloatLanes)
        rank += __builtin_popcount(greater_equal(load_keys(keys + j), key));
      for (int64_t j = own + kFloatLanes; j < count; j += kFloatLanes)
        rank += __builtin_popcount(greater(load_keys(keys + j), key));
#else
      const IntLanes before = lane < broadcast(static_cast<int32_t>(i - own));
      IntLanes total = -((mine > key) | ((mine == key) & before));
      for (int64_t j = 0; j < own; j += kFloatLanes) total -= load_keys(keys + j) >= key;
      for (int64_t j = own + kFloatLanes; j < count; j += kFloatLanes)
        total -= load_keys(keys + j) > key;
      const int64_t rank = sum_lanes(total);
#endif
      ordered[rank] = items[i];
    }
  }
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
