// Comparisons of whole vectors as bit masks, and the search for a NaN among many.
#pragma once

#include <type_traits>

#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

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
inline uint32_t bits_of(LongLanes comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)comparison);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)comparison));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)comparison));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) {
    bits |= (static_cast<uint32_t>(comparison[lane]) & 1u) << lane;
  }
  return bits;
#endif
}

enum class Comparison {
  kGreater,
  kGreaterEqual,
  kNotLess,      // greater, equal, or one of both is NaN
  kNotLessEqual  // greater, or one of both is NaN
};

// One bit per lane: how x compares with the bound.
#if defined(__AVX512F__)
template <Comparison kHow>
inline uint32_t reaching(FloatLanes x, FloatLanes bound) {
  if constexpr (kHow == Comparison::kGreater) return _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ);
  if constexpr (kHow == Comparison::kNotLess) return _mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ);
  if constexpr (kHow == Comparison::kNotLessEqual) {
    return _mm512_cmp_ps_mask(x, bound, _CMP_NLE_UQ);
  }
  return _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ);
}
template <Comparison kHow>
inline uint32_t reaching(DoubleLanes x, DoubleLanes bound) {
  if constexpr (kHow == Comparison::kGreater) return _mm512_cmp_pd_mask(x, bound, _CMP_GT_OQ);
  if constexpr (kHow == Comparison::kNotLess) return _mm512_cmp_pd_mask(x, bound, _CMP_NLT_UQ);
  if constexpr (kHow == Comparison::kNotLessEqual) {
    return _mm512_cmp_pd_mask(x, bound, _CMP_NLE_UQ);
  }
  return _mm512_cmp_pd_mask(x, bound, _CMP_GE_OQ);
}
template <Comparison kHow>
inline uint32_t reaching(IntLanes x, IntLanes bound) {
  if constexpr (kHow == Comparison::kGreater) {
    return _mm512_cmpgt_epi32_mask((__m512i)x, (__m512i)bound);
  }
  return _mm512_cmpge_epi32_mask((__m512i)x, (__m512i)bound);
}
template <Comparison kHow>
inline uint32_t reaching(LongLanes x, LongLanes bound) {
  if constexpr (kHow == Comparison::kGreater) {
    return _mm512_cmpgt_epi64_mask((__m512i)x, (__m512i)bound);
  }
  return _mm512_cmpge_epi64_mask((__m512i)x, (__m512i)bound);
}
#else
template <Comparison kHow, class Lanes>
inline uint32_t reaching(Lanes x, Lanes bound) {
  if constexpr (kHow == Comparison::kGreater) return bits_of(x > bound);
  if constexpr (kHow == Comparison::kNotLess) return bits_of(~(x < bound));
  if constexpr (kHow == Comparison::kNotLessEqual) return bits_of(~(x <= bound));
  return bits_of(x >= bound);
}
#endif

// The same for 64 elements; load_at(i) loads element i and those after it.
template <Comparison kHow, class LoadAt, class Lanes>
inline uint64_t compare_64(const LoadAt& load_at, Lanes bound) {
  constexpr int kLanes = sizeof(Lanes) / sizeof(bound[0]);
#if defined(__AVX512F__)  // joined as masks: one move to a general register instead of four
  const auto sixteen = [&](int i) -> uint32_t {
    if constexpr (kLanes == 16) return reaching<kHow>(load_at(i), bound);
    return _mm512_kunpackb(reaching<kHow>(load_at(i + 8), bound),
                           reaching<kHow>(load_at(i), bound));
  };
  const uint32_t a = sixteen(0), b = sixteen(16), c = sixteen(32), d = sixteen(48);
  return _mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a));
#else
  uint64_t hits = 0;
  for (int i = 0; i < 64; i += kLanes) {
    hits |= uint64_t{reaching<kHow>(load_at(i), bound)} << i;
  }
  return hits;
#endif
}

// The lanes of x whose bit is set, one after the other -> p[0], p[1], ...; returns how many. Up to
// a whole vector is written.
inline int store_chosen(int32_t* p, IntLanes x, uint32_t chosen) {
#if defined(__AVX512F__)  // into a register first: to memory, the instruction is slow on Zen 4
  const auto kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), (__m512i)x);
  std::memcpy(p, &kept, sizeof(kept));
  return __builtin_popcount(chosen);
#else
  int count = 0;
  for (; chosen != 0; chosen &= chosen - 1) p[count++] = x[__builtin_ctz(chosen)];
  return count;
#endif
}
inline int store_chosen(int64_t* p, LongLanes x, uint32_t chosen) {
#if defined(__AVX512F__)
  const auto kept = _mm512_maskz_compress_epi64(static_cast<__mmask8>(chosen), (__m512i)x);
  std::memcpy(p, &kept, sizeof(kept));
  return __builtin_popcount(chosen);
#else
  int count = 0;
  for (; chosen != 0; chosen &= chosen - 1) p[count++] = x[__builtin_ctz(chosen)];
  return count;
#endif
}

// total + 1 in each lane of x that reaches the bound.
template <Comparison kHow, class IntegerLanes, class Lanes>
inline IntegerLanes count_reaching(IntegerLanes total, Lanes x, Lanes bound) {
#if defined(__AVX512F__)
  const uint32_t reached = reaching<kHow>(x, bound);
  if constexpr (sizeof(bound[0]) == 4) {
    return (IntegerLanes)_mm512_mask_add_epi32((__m512i)total, static_cast<__mmask16>(reached),
                                               (__m512i)total, _mm512_set1_epi32(1));
  } else {
    return (IntegerLanes)_mm512_mask_add_epi64((__m512i)total, static_cast<__mmask8>(reached),
                                               (__m512i)total, _mm512_set1_epi64(1));
  }
#else
  if constexpr (kHow == Comparison::kGreater) return total - (x > bound);
  if constexpr (kHow == Comparison::kNotLess) return total + 1 + (x < bound);
  if constexpr (kHow == Comparison::kNotLessEqual) return total + 1 + (x <= bound);
  return total - (x >= bound);
#endif
}

// The larger of each lane; no lane is NaN.
inline FloatLanes larger(FloatLanes a, FloatLanes b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(kAllLanes, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline DoubleLanes larger(DoubleLanes a, DoubleLanes b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of each lane; no lane is NaN.
inline DoubleLanes smaller(DoubleLanes a, DoubleLanes b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_pd(0xff, a, b);
#elif defined(__AVX2__)
  return _mm256_min_pd(a, b);
#elif defined(__SSE2__)
  return _mm_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// ---- a NaN among many vectors ----

// Keeps loaded vectors in their registers: the compiler would load them again for a second use.
// With SSE, whose instructions overwrite an operand, that is quicker.
template <class Lanes>
inline void keep_loaded(Lanes* a, Lanes* b) {
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
template <class Lanes>
class NanSearch {
 public:
  // Neighbouring pairs of vectors in neighbouring slots do not wait for one another.
  template <int kSlot>
  void see(Lanes a, Lanes b) {
#if defined(__AVX512F__)  // a comparison under a mask is a conjunction
    Mask& ordered = ordered_[kSlot % kSlots];
    if constexpr (kFloats) {
      ordered = _mm512_mask_cmp_ps_mask(ordered, (__m512)a, (__m512)b, _CMP_ORD_Q);
    } else {
      ordered = _mm512_mask_cmp_pd_mask(ordered, (__m512d)a, (__m512d)b, _CMP_ORD_Q);
    }
#elif defined(__AVX2__)
    if constexpr (kFloats) {
      unordered_ |= (IntLanes)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
    } else {
      unordered_ |= (IntLanes)_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_UNORD_Q);
    }
#elif defined(__SSE2__)
    if constexpr (kFloats) {
      unordered_ |= (IntLanes)_mm_cmpunord_ps((__m128)a, (__m128)b);
    } else {
      unordered_ |= (IntLanes)_mm_cmpunord_pd((__m128d)a, (__m128d)b);
    }
#else
    unordered_ |= (IntLanes)((a != a) | (b != b));
#endif
  }

  bool found() const {
#if defined(__AVX512F__)
    return (ordered_[0] & ordered_[1] & ordered_[2] & ordered_[3]) != kAll;
#else
    return bits_of(unordered_) != 0;
#endif
  }

 private:
  static constexpr bool kFloats = std::is_same_v<Lanes, FloatLanes>;
#if defined(__AVX512F__)
  using Mask = std::conditional_t<kFloats, __mmask16, __mmask8>;
  static constexpr int kSlots = 4;
  static constexpr Mask kAll = static_cast<Mask>(0xffff);
  Mask ordered_[kSlots] = {kAll, kAll, kAll, kAll};
#else
  IntLanes unordered_ = {};
#endif
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
