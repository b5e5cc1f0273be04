// Host stand-in for the half-precision type of CUDA: 1 sign bit, 5 of exponent, 10 of fraction.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1fu, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float size = std::ldexp(static_cast<float>(fraction), -24);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(size) | sign);
  }
  const uint32_t rebased = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | rebased << 23 | fraction << 13);
}

// Rounds to nearest, ties to even; any NaN becomes the one that the hardware makes.
inline __half __float2half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
  if (size < 0x38800000u) {
    // Below the least normal number: a multiple of 2^-24, which nearbyint rounds to even.
    const float steps = std::nearbyint(std::ldexp(std::bit_cast<float>(size), 24));
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(steps))};
  }
  const uint32_t rebased = size - (static_cast<uint32_t>(127 - 15) << 23), odd = rebased >> 13 & 1u;
  return {static_cast<uint16_t>(sign | (rebased + 0xfffu + odd) >> 13)};
}
inline __half __float2half_rn(float x) { return __float2half(x); }
