// Vectors of accumulators: loads and stores from every stored type, and sums.
#pragma once

#include <type_traits>

#include "cpu/simd/numbers.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// 16-bit lanes to 32-bit lanes and back. The intrinsics are one instruction (two on AVX2, back);
// GCC 12 splits __builtin_convertvector into halves.
inline FloatBits widen(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatBits)_mm512_maskz_cvtepu16_epi32(kAllLanes, half);
#elif defined(__AVX2__)
  return (FloatBits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HalfBits half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, FloatBits);
#endif
}
inline void narrow(FloatBits bits, uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)bits);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  const __m128i half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  const HalfBits half = __builtin_convertvector(bits, HalfBits);
#endif
  std::memcpy(p, &half, sizeof(half));
}

inline FloatLanes load(const float* p) {
  FloatLanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline DoubleLanes load(const double* p) {
  DoubleLanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline FloatLanes load(const BFloat16* p) { return (FloatLanes)(widen(&p->bits) << 16); }
inline FloatLanes load(const Float16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_maskz_cvtph_ps(kAllLanes, half);
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  FloatLanes x;
  for (int lane = 0; lane < kFloatLanes; ++lane) x[lane] = to_sum(p[lane]);
  return x;
#endif
}

// Two vectors of neighbouring elements, dealt to them in any order.
template <class Stored, class Lanes>
inline void load_pair(const Stored* p, Lanes* first, Lanes* second) {
  *first = load(p);
  *second = load(p + Sum<Stored>::kLanes);
}
inline void load_pair(const BFloat16* p, FloatLanes* first, FloatLanes* second) {
  FloatBits pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  *first = (FloatLanes)(pairs << 16);
  *second = (FloatLanes)(pairs & 0xffff0000u);
}

inline void store(float* p, FloatLanes x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(double* p, DoubleLanes x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(BFloat16* p, FloatLanes x) {
  const FloatBits bits = (FloatBits)x;
  const FloatBits not_a_number = (FloatBits)(x != x);
  const FloatBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatBits quiet = (bits >> 16) | 0x40u;
  narrow((not_a_number & quiet) | (~not_a_number & rounded), &p->bits);
}
inline void store(Float16* p, FloatLanes x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(kAllLanes, x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#else
  for (int lane = 0; lane < kFloatLanes; ++lane) from_sum(x[lane], p + lane);
#endif
}

// Stores a vector past the caches if it is a whole, aligned cache line (on AVX-512): then the line
// need not be read first. `fence_past_caches` makes such stores visible to other threads.
template <class Lanes, class Stored>
inline void store_past_caches(Stored* p, Lanes x) {
#if defined(__AVX512F__)
  const bool aligned = reinterpret_cast<uintptr_t>(p) % kCacheLineBytes == 0;
  if (aligned && sizeof(Stored) * Sum<Stored>::kLanes == kCacheLineBytes) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(x));
  }
#endif
  store(p, x);
}
inline void fence_past_caches() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// a * b + c. Fused where the instruction set has it, always or never within one build.
inline FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline DoubleLanes multiply_add(DoubleLanes a, DoubleLanes b, DoubleLanes c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// x in every lane. Subtracting zero keeps every x, -0.0 too.
inline FloatLanes broadcast(float x) { return x - FloatLanes{}; }
inline DoubleLanes broadcast(double x) { return x - DoubleLanes{}; }
inline IntLanes broadcast(int32_t x) { return x - IntLanes{}; }
inline LongLanes broadcast(int64_t x) { return x - LongLanes{}; }

// The sum of the lanes, by halves: the same order every time.
template <class Lanes>
inline auto sum_lanes(Lanes x) {
  auto scalar = x[0];
  constexpr int kCount = sizeof(Lanes) / sizeof(scalar);
  decltype(scalar) part[kCount];
  std::memcpy(part, &x, sizeof(x));
  for (int half = kCount / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

template <class Lanes>
inline auto largest_lane(Lanes x) {
  auto part = x[0];
  for (int lane = 1; lane < static_cast<int>(sizeof(x) / sizeof(part)); ++lane) {
    part = x[lane] > part ? x[lane] : part;
  }
  return part;
}

// ---- the last, partial vector of a row: `count` elements exist, the other lanes are zero ----

template <class Stored>
inline typename Sum<Stored>::Lanes load_partial(const Stored* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Stored, float>) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  } else if constexpr (std::is_same_v<Stored, double>) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  }
#endif
  Stored padded[Sum<Stored>::kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(Stored));
  return load(padded);
}
template <class Stored>
inline void store_partial(Stored* p, typename Sum<Stored>::Lanes x, int64_t count) {
  Stored padded[Sum<Stored>::kLanes];
  store(padded, x);
  std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(Stored));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
