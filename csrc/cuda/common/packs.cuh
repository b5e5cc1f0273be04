// Stored numbers as float, and up to 16 bytes of them at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/launch.cuh"

namespace sparsekern::cuda {

constexpr int kVectorBytes = 16;  // the widest load of a thread

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ inline void from_float(float x, __half* out) { *out = __float2half(x); }

// kCount consecutive numbers, as stored: 8, 16, 32, ... bytes. Kept as they are until used, so that
// a load in flight takes as few registers as possible.
template <class T, int kCount>
struct Pack {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  using Word = typename std::conditional<(kBytes < kVectorBytes), unsigned long long, uint4>::type;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  static_assert(kWords * static_cast<int>(sizeof(Word)) == kBytes, "a whole number of words");

  T item[kCount];

  // p is aligned to the word.
  __device__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word word = __ldg(reinterpret_cast<const Word*>(p) + i);
      __builtin_memcpy(reinterpret_cast<char*>(item) + i * sizeof(Word), &word, sizeof(Word));
    }
  }
  __device__ void load_shared(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word word = reinterpret_cast<const Word*>(p)[i];
      __builtin_memcpy(reinterpret_cast<char*>(item) + i * sizeof(Word), &word, sizeof(Word));
    }
  }
  __device__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      Word word;
      __builtin_memcpy(&word, reinterpret_cast<const char*>(item) + i * sizeof(Word), sizeof(Word));
      reinterpret_cast<Word*>(p)[i] = word;
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int c = 0; c < kCount; ++c) from_float(0.0f, &item[c]);
  }
};

// Whether rows of d numbers that start `stride` apart can be read kCount at a time.
template <int kCount, class T>
bool packs_fit(const T* p, int64_t stride, int64_t d) {
  constexpr int kAlignment = kCount * sizeof(T) < kVectorBytes ? kCount * sizeof(T) : kVectorBytes;
  const bool aligned = reinterpret_cast<uintptr_t>(p) % kAlignment == 0;
  return aligned && stride * sizeof(T) % kAlignment == 0 && d % kCount == 0;
}

}  // namespace sparsekern::cuda
