// Keys: unsigned integers in the order of values. Here the smaller the key, the earlier the element
// comes, so that pairs of a key and an index ascend in the total order.
#pragma once

#include "cuda/common/packs.cuh"

namespace sparsekern::cuda {

// Low bits that are the same in the float bits of all numbers of a type (of one sign). Keys leave
// them out: fewer steps of a bisection, fewer digits to count.
template <class T>
constexpr int key_shift = 0;
template <>
constexpr int key_shift<__nv_bfloat16> = 16;
template <>
constexpr int key_shift<__half> = 13;

constexpr unsigned kNoKey = 0xffffffffu;      // comes after every number, -inf included
constexpr unsigned kSigned = 0xffffffffu;     // masks of float bits: order by value,
constexpr unsigned kMagnitude = 0x7fffffffu;  // by absolute value

// What is compared of an element: x or |x|.
template <class T>
__device__ inline float compared(T x, unsigned mask) {
  return __int_as_float(__float_as_int(to_float(x)) & static_cast<int>(mask));
}

// key(a) < key(b) exactly when a comes before b: NaN first (all equal), then +inf, ..., -inf,
// with -0 equal to +0.
template <class T>
__device__ inline unsigned key_of(T x, unsigned mask) {
  const float value = compared(x, mask) + 0.0f;  // -0 + 0 is +0
  const int bits = __float_as_int(value);
  // The bits of negative numbers, read as unsigned, already grow as the number falls.
  const unsigned key = static_cast<unsigned>(bits < 0 ? bits : bits ^ 0x7fffffff);
  return value != value ? 0u : key >> key_shift<T>;
}

// The float t such that, for every number x, x comes before the key exactly when x > t. The key
// is that of a number or of NaN, or kNoKey: then t is NaN and !(x <= t) holds for every x.
template <class T>
__device__ inline float float_of(unsigned key) {
  constexpr unsigned constant = (1u << key_shift<T>)-1u;
  if (key == kNoKey) return __int_as_float(0x7fffffff);
  if (key == 0) return __int_as_float(0x7f800000);
  const unsigned bits = key << key_shift<T>;
  const unsigned value = (bits >> 31) != 0 ? bits : (bits ^ 0x7fffffffu) & ~constant;
  return __int_as_float(static_cast<int>(value));
}

// The number of a key: key_of undone, but for -0 and for what a NaN's bits say.
template <class T>
__device__ inline float number_of(unsigned key) {
  return key == 0 ? __int_as_float(0x7fc00000) : float_of<T>(key);
}

// A key and the element's index as one integer: ascending pairs are the total order.
using Pair = unsigned long long;
constexpr Pair kNoPair = ~Pair(0);

__device__ inline Pair make_pair_of(unsigned high, unsigned low) {
  return static_cast<Pair>(high) << 32 | low;
}
__device__ inline unsigned high_of(Pair pair) { return static_cast<unsigned>(pair >> 32); }
__device__ inline unsigned low_of(Pair pair) { return static_cast<unsigned>(pair); }

}  // namespace sparsekern::cuda
