// The total order on values as unsigned ranks: the smaller the rank, the earlier the value.
#pragma once

#include "cuda/common/dtypes.cuh"

namespace sparsekern::cuda {

// Low bits that are the same in the float bits of all numbers of a type (of one sign). Ranks leave
// them out: fewer steps of a bisection, fewer digits to count.
template <class T>
constexpr int rank_shift = 0;
template <>
constexpr int rank_shift<__nv_bfloat16> = 16;
template <>
constexpr int rank_shift<__half> = 13;

constexpr unsigned kNoRank = 0xffffffffu;     // comes after every number, -inf included
constexpr unsigned kSigned = 0xffffffffu;     // masks of float bits: order by value,
constexpr unsigned kMagnitude = 0x7fffffffu;  // by absolute value

// The number that is compared: x or |x|.
template <class T>
__device__ inline float compared(T x, unsigned mask) {
  return __int_as_float(__float_as_int(to_float(x)) & static_cast<int>(mask));
}

// rank(a) < rank(b) exactly when a comes before b: NaN first (all equal), then +inf, ..., -inf,
// with -0 equal to +0.
template <class T>
__device__ inline unsigned rank_of(T x, unsigned mask) {
  const float value = compared(x, mask) + 0.0f;  // -0 + 0 is +0
  const int bits = __float_as_int(value);
  // The bits of negative numbers, read as unsigned, already grow as the number falls.
  const unsigned rank = static_cast<unsigned>(bits < 0 ? bits : bits ^ 0x7fffffff);
  return value != value ? 0u : rank >> rank_shift<T>;
}

// The float t such that, for every number x, x comes before the rank exactly when x > t. The rank
// is that of a number or of NaN, or kNoRank: then t is NaN and !(x <= t) holds for every x.
template <class T>
__device__ inline float float_of_rank(unsigned rank) {
  constexpr unsigned constant = (1u << rank_shift<T>)-1u;
  if (rank == kNoRank) return __int_as_float(0x7fffffff);
  if (rank == 0) return __int_as_float(0x7f800000);
  const unsigned bits = rank << rank_shift<T>;
  const unsigned value = (bits >> 31) != 0 ? bits : (bits ^ 0x7fffffffu) & ~constant;
  return __int_as_float(static_cast<int>(value));
}

// A rank and the element's index as one integer: ascending pairs are the total order.
using Pair = unsigned long long;
constexpr Pair kNoPair = ~Pair(0);

__device__ inline Pair make_pair_of(unsigned high, unsigned low) {
  return static_cast<Pair>(high) << 32 | low;
}
__device__ inline unsigned high_of(Pair pair) { return static_cast<unsigned>(pair >> 32); }
__device__ inline unsigned low_of(Pair pair) { return static_cast<unsigned>(pair); }

}  // namespace sparsekern::cuda
