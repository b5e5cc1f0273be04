// Host stand-in for the part of the CUDA runtime and of the device functions that csrc/cuda uses.
// Names and meaning are those of the CUDA C++ programming guide; what is missing here is not part
// of our dialect, and using it is a compile error.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/emulation/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, so one copy is enough. AddressSanitizer guards both of its ends.
#define __shared__ static

#define threadIdx (::sparsekern::emulation::place.thread)
#define blockIdx (::sparsekern::emulation::place.block)
#define blockDim (::sparsekern::emulation::place.block_dim)
#define gridDim (::sparsekern::emulation::place.grid_dim)

#include "tests/emulation/atomics.h"
#include "tests/emulation/runtime_calls.h"
#include "tests/emulation/vectors.h"
#include "tests/emulation/warp.h"

constexpr int warpSize = 32;

inline void __syncthreads(
    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  sync_block(sparsekern::emulation::Together::syncthreads, false, where);
}

inline int __syncthreads_count(
    int predicate, sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sync_block(sparsekern::emulation::Together::syncthreads_count, predicate != 0, where);
}

inline int __syncthreads_or(
    int predicate, sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sync_block(sparsekern::emulation::Together::syncthreads_or, predicate != 0, where) > 0;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

// Device code has min and max in the global namespace, also for two types.
template <class A, class B>
constexpr auto min(A a, B b) {
  using T = decltype(a + b);
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using T = decltype(a + b);
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
