// Keys: integers in the order of values. The larger the key, the earlier the element comes.
#pragma once

#include <limits>

#include "cpu/simd/numbers.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

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
inline LongLanes keys_of(DoubleLanes x) {
  const LongLanes signed_zero = (LongLanes)x == INT64_MIN;
  const LongLanes bits = (LongLanes)x & ~signed_zero;
  const LongLanes unordered = (LongLanes)(x != x);
  const LongLanes ordered = bits ^ ((bits >> 63) & INT64_MAX);
  return (unordered & INT64_MAX) | (~unordered & ordered);
}
// The number whose key it is; key lies between those of -inf and +inf.
inline float number_of(int32_t key) { return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }
inline double number_of(int64_t key) { return bit_cast<double>(key ^ ((key >> 63) & INT64_MAX)); }

// What is compared of an element: the value, or its magnitude.
template <bool kAbsolute, class T>
inline T compared(T x) {
  return kAbsolute && x < 0 ? -x : x;
}
template <bool kAbsolute>
inline FloatLanes compared_lanes(FloatLanes x) {
  if constexpr (kAbsolute) return (FloatLanes)((IntLanes)x & 0x7fffffff);
  return x;
}
template <bool kAbsolute>
inline DoubleLanes compared_lanes(DoubleLanes x) {
  if constexpr (kAbsolute) return (DoubleLanes)((LongLanes)x & INT64_MAX);
  return x;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
