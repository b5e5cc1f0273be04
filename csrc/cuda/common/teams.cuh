// Teams of threads that share a row, and rows of zeros.
#pragma once

#include "cuda/common/packs.cuh"
#include "cuda/common/warp.cuh"

namespace sparsekern::cuda {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

struct WarpTeam {
  static constexpr int kSize = kWarp;
  __device__ static int self() { return threadIdx.x % kWarp; }
  __device__ static void sync() { __syncwarp(); }
  // Whether x holds for any thread; a barrier as well.
  __device__ static bool any(bool x) {
    __syncwarp();
    return __any_sync(kFullMask, x) != 0;
  }
};

struct BlockTeam {
  static constexpr int kSize = kBlockThreads;
  __device__ static int self() { return threadIdx.x; }
  __device__ static void sync() { __syncthreads(); }
  __device__ static bool any(bool x) { return __syncthreads_or(x) != 0; }
};

// out[0..count) = 0, with 16-byte stores where they are aligned.
template <class Team, class T>
__device__ void write_zeros(T* out, int64_t count) {
  constexpr int kItems = kVectorBytes / sizeof(T);
  T zero;
  from_float(0.0f, &zero);
  const int64_t past = reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T);
  const int64_t to_aligned = past == 0 ? 0 : kItems - past;
  const int64_t head = to_aligned < count ? to_aligned : count;
  const int64_t words = (count - head) / kItems;
  if (Team::self() < head) out[Team::self()] = zero;
  uint4* aligned = reinterpret_cast<uint4*>(out + head);
  for (int64_t w = Team::self(); w < words; w += Team::kSize) aligned[w] = uint4{0, 0, 0, 0};
  const int64_t tail = head + words * kItems + Team::self();
  if (tail < count) out[tail] = zero;
}

}  // namespace sparsekern::cuda
