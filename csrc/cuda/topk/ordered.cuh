// Taking the selected elements of a row by ascending index, once its bound is known.
#pragma once

#include "cuda/topk/bound.cuh"

namespace sparsekern::cuda {

// Elements a lane looks at between two uses of what it found, so that as many loads are in flight.
constexpr int kSweep = 8;

// Calls take(position, i, key) for the first k elements of the total order, position ascending
// with i; key_at(i) is the key of element i. For a whole block: each warp owns a stretch of the
// row, counts what it will take, learns where that goes, and takes it. Reads the keys twice.
template <class KeyAt, class Take>
__device__ void take_in_order(BlockReduce& reduce, int64_t n, const Bound& bound, int ties,
                              const KeyAt& key_at, const Take& take) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = kWarp * kSweep;
  const int64_t stretch = (n + kBlockWarps * step - 1) / (kBlockWarps * step) * step;
  const int64_t begin = threadIdx.x / kWarp * stretch;
  const int64_t end = begin + stretch < n ? begin + stretch : n;
  int before = 0, equal = 0;
  for (int64_t base = begin; base < end; base += step) {
#pragma unroll
    for (int s = 0; s < kSweep; ++s) {
      const int64_t i = base + s * kWarp + lane;
      const unsigned key = i < end ? key_at(i) : kNoKey;
      before += key < bound.key;
      equal += key == bound.key;
    }
  }
  int position = reduce.before_warp(before);
  const int ties_before = reduce.before_warp(equal);
  position += ties_before < ties ? ties_before : ties;
  ties = ties_before < ties ? ties - ties_before : 0;
  const unsigned lanes_before = (1u << lane) - 1;
  for (int64_t base = begin; base < end; base += step) {
    unsigned keys[kSweep];
#pragma unroll
    for (int s = 0; s < kSweep; ++s) {
      const int64_t i = base + s * kWarp + lane;
      keys[s] = i < end ? key_at(i) : kNoKey;
    }
#pragma unroll
    for (int s = 0; s < kSweep; ++s) {
      const unsigned tied = __ballot_sync(kFullMask, keys[s] == bound.key);
      const bool taken =
          keys[s] < bound.key || (keys[s] == bound.key && __popc(tied & lanes_before) < ties);
      const unsigned takers = __ballot_sync(kFullMask, taken);
      if (taken) {
        take(position + __popc(takers & lanes_before), base + s * kWarp + lane, keys[s]);
      }
      position += __popc(takers);
      const int used = __popc(tied);
      ties = used < ties ? ties - used : 0;
    }
  }
}

}  // namespace sparsekern::cuda
