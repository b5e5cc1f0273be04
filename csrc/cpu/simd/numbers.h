// One stored number to the type it is summed in, and back.
#pragma once

#include "cpu/simd/lanes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

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

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
