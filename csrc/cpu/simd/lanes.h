// Vectors: how wide they are, and in which of them a stored type is summed.
//
// Everything compiled per instruction set lives in the namespace of that set, so that no symbol
// compiled for a newer one is ever shared with code that must run on an older one. For the same
// reason memory comes from Buffer (cpu/common/buffer.h) and not from std::vector.
#pragma once

#include <cstdint>
#include <cstring>

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
using IntLanes = int32_t __attribute__((vector_size(kLaneBytes)));
using LongLanes = int64_t __attribute__((vector_size(kLaneBytes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which a stored type is summed, its vector, the number of lanes, and the integers as
// wide.
template <class Stored>
struct Sum {
  using Scalar = float;
  using Lanes = FloatLanes;
  using Integer = int32_t;
  using IntegerLanes = IntLanes;
  static constexpr int kLanes = kFloatLanes;
};
template <>
struct Sum<double> {
  using Scalar = double;
  using Lanes = DoubleLanes;
  using Integer = int64_t;
  using IntegerLanes = LongLanes;
  static constexpr int kLanes = kDoubleLanes;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
