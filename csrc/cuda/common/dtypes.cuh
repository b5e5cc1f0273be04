// Stored number types: reading and writing them as float, up to 16 bytes at a time, finding the
// types behind the tags; and sums over a warp.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "cuda/common/launch.cuh"

namespace sparsekern::cuda {

constexpr int kVectorBytes = 16;  // the widest load of a thread
constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The sum of x over the warp, in every lane; the same tree every time.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

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

// Indices of either integer type. The branch is the same for all threads, and an index is read once
// for hundreds of products, so it is not worth a second set of kernels.
struct Indices {
  const void* data;
  int tag;    // 0 int64, 1 int32
  int64_t n;  // valid: 0..n-1, n < 2^31

  // The index at a flat position, or -1 when it is not valid.
  __device__ int at(int64_t position) const {
    const int64_t index = tag == 0 ? static_cast<const int64_t*>(data)[position]
                                   : static_cast<const int32_t*>(data)[position];
    return index >= 0 && index < n ? static_cast<int>(index) : -1;
  }
};

inline Indices make_indices(const void* data, int tag, int64_t n) {
  if (tag != 0 && tag != 1) {
    throw std::runtime_error("the index tag must be 0 (int64) or 1 (int32)");
  }
  return Indices{data, tag, n};
}

// Whether rows of d numbers that start `stride` apart can be read kCount at a time.
template <int kCount, class T>
bool packs_fit(const T* p, int64_t stride, int64_t d) {
  constexpr int kAlignment = kCount * sizeof(T) < kVectorBytes ? kCount * sizeof(T) : kVectorBytes;
  const bool aligned = reinterpret_cast<uintptr_t>(p) % kAlignment == 0;
  return aligned && stride * sizeof(T) % kAlignment == 0 && d % kCount == 0;
}

// Calls visit(Values(), Weight()) for the types behind the tags of the codes and of the dictionary.
template <class Visit>
void visit_types(int dtype, int weight_dtype, Visit&& visit) {
  if (dtype == 0 && weight_dtype == 0) return visit(float(), float());
  if (dtype == 1 && weight_dtype == 1) return visit(__nv_bfloat16(), __nv_bfloat16());
  if (dtype == 2 && weight_dtype == 2) return visit(__half(), __half());
  if (dtype == 1 && weight_dtype == 0) return visit(__nv_bfloat16(), float());
  if (dtype == 2 && weight_dtype == 0) return visit(__half(), float());
  throw std::runtime_error(
      "the dtype tags must be 0 (float32), 1 (bfloat16) or 2 (float16), and the same for the "
      "weight "
      "or 0");
}

}  // namespace sparsekern::cuda
