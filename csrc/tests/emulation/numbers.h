// Numbers of the kernels' dtypes in memory of exactly the size they need, for the checkers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/common/packs.cuh"
#include "interface/operands.h"

namespace sparsekern::emulation {

// Unit roundoffs of float32, bfloat16, float16, and the smallest step of float16.
inline constexpr double kRoundoff[] = {1.0 / (1 << 24), 1.0 / (1 << 8), 1.0 / (1 << 11)};
inline constexpr double kSmallestStep = 1.0 / (1 << 24);
inline constexpr int64_t kBytes[] = {4, 2, 2};

// Numbers of one dtype in a block of exactly the size they need, `shift` numbers from its start.
struct Numbers {
  Dtype dtype;
  int64_t size, shift;
  std::vector<unsigned char> bytes;

  Numbers(Dtype dtype, int64_t size, int64_t shift = 0)
      : dtype(dtype), size(size), shift(shift), bytes((size + shift) * kBytes[dtype]) {}

  unsigned char* data() { return bytes.data() + shift * kBytes[dtype]; }
  const unsigned char* data() const { return bytes.data() + shift * kBytes[dtype]; }
  template <class T>
  T get(int64_t i) const {
    T x;
    std::memcpy(&x, data() + i * sizeof(T), sizeof(T));
    return x;
  }
  double operator[](int64_t i) const {
    if (dtype == kFloat32) return get<float>(i);
    if (dtype == kBFloat16) return __bfloat162float(get<__nv_bfloat16>(i));
    return __half2float(get<__half>(i));
  }
  void set(int64_t i, float x) {
    const __nv_bfloat16 b = __float2bfloat16(x);
    const __half h = __float2half(x);
    const void* stored = dtype == kFloat32    ? static_cast<const void*>(&x)
                         : dtype == kBFloat16 ? &b
                                              : static_cast<const void*>(&h);
    std::memcpy(data() + i * kBytes[dtype], stored, kBytes[dtype]);
  }
  // Every byte 0xff is a NaN in all three dtypes.
  void poison(int byte) { std::fill(bytes.begin(), bytes.end(), static_cast<unsigned char>(byte)); }
};

}  // namespace sparsekern::emulation
