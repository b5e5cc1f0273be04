// Vectors of accumulators, and their loads and stores from every stored type.
//
// Everything lives in the namespace of one instruction set, so that no symbol compiled for a newer
// one is ever shared with code that must run on an older one. For the same reason memory comes from
// Buffer and not from std::vector.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sparsekern::cpu::SPARSEKERN_ISA {

#if defined(__AVX512F__)
constexpr int kLaneBytes = 64;
// The unmasked conversions of GCC's headers warn about a variable they leave uninitialised.
constexpr __mmask16 kAllLanes = 0xffff;
#elif defined(__AVX2__)
constexpr int kLaneBytes = 32;
#else
constexpr int kLaneBytes = 16;  // SSE2 and NEON
#endif
constexpr int64_t kCacheLineBytes = 64;

constexpr int kFloatLanes = kLaneBytes / 4;
constexpr int kDoubleLanes = kLaneBytes / 8;
using FloatLanes = float __attribute__((vector_size(kLaneBytes)));
using DoubleLanes = double __attribute__((vector_size(kLaneBytes)));
using FloatBits = uint32_t __attribute__((vector_size(kLaneBytes)));
using HalfBits = uint16_t __attribute__((vector_size(kLaneBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which a stored type is summed, its vector and the number of lanes.
template <class Stored>
struct Sum {
  using Scalar = float;
  using Lanes = FloatLanes;
  static constexpr int kLanes = kFloatLanes;
};
template <>
struct Sum<double> {
  using Scalar = double;
  using Lanes = DoubleLanes;
  static constexpr int kLanes = kDoubleLanes;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- one element ----

inline float to_sum(float x) { return x; }
inline double to_sum(double x) { return x; }
inline float to_sum(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_sum(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t mantissa = x.bits & 0x3ffu;
  uint32_t magnitude;
  if (exponent == 0) {  // zero and subnormals: multiples of 2^-24
    magnitude = bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f);
  } else if (exponent == 31) {  // infinity and NaN, which becomes quiet as in hardware
    magnitude = 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u);
  } else {
    magnitude = ((exponent + 112) << 23) | (mantissa << 13);
  }
  return bit_cast<float>(sign | magnitude);
#endif
}

inline void from_sum(float x, float* p) { *p = x; }
inline void from_sum(double x, double* p) { *p = x; }
inline void from_sum(float x, BFloat16* p) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}
inline void from_sum(float x, Float16* p) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  p->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half);
#endif
}

// ---- whole vectors ----

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
template <class Stored>
inline void load_pair(const Stored* p, FloatLanes* first, FloatLanes* second) {
  *first = load(p);
  *second = load(p + kFloatLanes);
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
// need not be read first. `finish_streams` makes such stores visible to other threads.
template <class Lanes, class Stored>
inline void stream(Stored* p, Lanes x) {
#if defined(__AVX512F__)
  const bool aligned = reinterpret_cast<uintptr_t>(p) % kCacheLineBytes == 0;
  if (aligned && sizeof(Stored) * Sum<Stored>::kLanes == kCacheLineBytes) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(x));
  }
#endif
  store(p, x);
}
inline void finish_streams() {
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

// ---- the last, partial vector of a row: `count` elements exist, the other lanes are zero ----

template <class Stored>
inline typename Sum<Stored>::Lanes load_partial(const Stored* p, int64_t count) {
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

// ---- scratch memory, aligned to cache lines ----

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr int64_t kMost = INT64_MAX / static_cast<int64_t>(sizeof(T)) - kCacheLineBytes;
    if (count < 0 || count > kMost) throw std::bad_alloc();
    const size_t line = static_cast<size_t>(kCacheLineBytes);
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + line) / line * line;
    data_ = static_cast<T*>(std::aligned_alloc(line, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Calls visit(Values{}, Weight{}) with the stored types behind the two tags.
template <class Visit>
void visit_types(int dtype, int weight_dtype, Visit&& visit) {
  if (dtype == 0 && weight_dtype == 0) {
    visit(float{}, float{});
  } else if (dtype == 1 && weight_dtype == 1) {
    visit(BFloat16{}, BFloat16{});
  } else if (dtype == 1 && weight_dtype == 0) {
    visit(BFloat16{}, float{});
  } else if (dtype == 2 && weight_dtype == 2) {
    visit(Float16{}, Float16{});
  } else if (dtype == 2 && weight_dtype == 0) {
    visit(Float16{}, float{});
  } else if (dtype == 3 && weight_dtype == 3) {
    visit(double{}, double{});
  } else {
    throw std::runtime_error("sparse_matmul: the weight must have the values' dtype or float32");
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
