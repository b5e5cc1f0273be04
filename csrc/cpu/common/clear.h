// Zeros in a large output.
#pragma once

#include <algorithm>

#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Outputs from this size on are written past the caches, which they would not fit.
constexpr int64_t kLargerThanCaches = 16 << 20;
constexpr double kNanosecondsPerClearedByte = 0.05;

// Zeros at [start, start + bytes). Stores past the caches (on AVX-512) save reading each line
// before it is overwritten. Measured on 33 MB that are mapped already: 1.6 ms instead of 2.0.
inline void clear(void* start, int64_t bytes, bool past_caches) {
  char *at = static_cast<char*>(start), *end = at + bytes;
  if (past_caches) {
    const auto skipped = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(at) % kCacheLineBytes);
    const int64_t head = std::min(bytes, skipped);
    std::memset(at, 0, static_cast<size_t>(head));
    for (at += head; at + kLaneBytes <= end; at += kLaneBytes) {
      store_past_caches(reinterpret_cast<float*>(at), FloatLanes{});
    }
    fence_past_caches();
  }
  std::memset(at, 0, static_cast<size_t>(end - at));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
