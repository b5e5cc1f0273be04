// Finding the k-th key by bisection, for a warp and for a block.
#pragma once

#include "cuda/topk/batch.cuh"

namespace sparsekern::cuda {

// A key v such that `count` keys are <= v.
struct Bound {
  unsigned key;
  int count;
};

// The least v in [low, high] with count(v) >= wanted, or any v on the way there with count(v) <=
// wanted + slack. count(v), the number of keys <= v, is at least `wanted` at high.
template <class Count>
__device__ Bound bisect(unsigned low, unsigned high, int wanted, int slack, const Count& count) {
  int at_high = 0;
  unsigned middle = high;
  while (true) {
    const int at_middle = count(middle);
    if (at_middle >= wanted) {
      high = middle;
      at_high = at_middle;
    } else {
      low = middle + 1;
    }
    if (low >= high || at_high <= wanted + slack) return {high, at_high};
    middle = low + (high - low) / 2;
  }
}

// How many elements at the bound itself are selected, by ascending index; those before it all are.
template <class Count>
__device__ int ties_at(const Bound& bound, int wanted, const Count& count) {
  if (bound.count <= wanted) return 0x7fffffff;
  return wanted - (bound.key == 0 ? 0 : count(bound.key - 1));
}

// Sums, minima and maxima over the threads of a team, for all of them.
template <class Team>
class TeamReduce;

template <>
class TeamReduce<WarpTeam> {
 public:
  __device__ int sum(int x) {
    return static_cast<int>(__reduce_add_sync(kFullMask, static_cast<unsigned>(x)));
  }
  __device__ unsigned least(unsigned x) { return __reduce_min_sync(kFullMask, x); }
  __device__ unsigned greatest(unsigned x) { return __reduce_max_sync(kFullMask, x); }
};

// One barrier each: a call writes the half of the slots that the call before the last one read.
template <>
class TeamReduce<BlockTeam> {
 public:
  __device__ int sum(int x) {
    const unsigned* slots = share(__reduce_add_sync(kFullMask, static_cast<unsigned>(x)));
    unsigned total = 0;
    for (int w = 0; w < kBlockWarps; ++w) total += slots[w];
    return static_cast<int>(total);
  }
  __device__ unsigned least(unsigned x) {
    const unsigned* slots = share(__reduce_min_sync(kFullMask, x));
    unsigned least = slots[0];
    for (int w = 1; w < kBlockWarps; ++w) least = slots[w] < least ? slots[w] : least;
    return least;
  }
  __device__ unsigned greatest(unsigned x) { return ~least(~x); }

  // The sum over the warps before this one.
  __device__ int before_warp(int x) {
    const unsigned* slots = share(__reduce_add_sync(kFullMask, static_cast<unsigned>(x)));
    unsigned before = 0;
    for (int w = 0; w < static_cast<int>(threadIdx.x) / kWarp; ++w) before += slots[w];
    return static_cast<int>(before);
  }

  // The sum over the threads before this one; *total over all of them.
  __device__ int before(int x, int* total) {
    const int upto = warp_sum_upto(x);
    const unsigned* slots = share(static_cast<unsigned>(__shfl_sync(kFullMask, upto, kWarp - 1)));
    unsigned before = 0, sum = 0;
    for (int w = 0; w < kBlockWarps; ++w) {
      if (w < static_cast<int>(threadIdx.x) / kWarp) before += slots[w];
      sum += slots[w];
    }
    *total = static_cast<int>(sum);
    return static_cast<int>(before) + upto - x;
  }

 private:
  __device__ const unsigned* share(unsigned x) {
    __shared__ unsigned slots[2][kBlockWarps];
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) slots[turn_][threadIdx.x / kWarp] = x;
    __syncthreads();
    return slots[turn_];
  }

  int turn_ = 0;
};

using BlockReduce = TeamReduce<BlockTeam>;

// ---- keys that the threads of a team hold, kHeld each; kNoKey where there is none ----

// How many are <= v.
template <class Team, int kHeld>
__device__ int count_to(TeamReduce<Team>& reduce, const unsigned (&keys)[kHeld], unsigned v) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) count += keys[j] <= v;
  return reduce.sum(count);
}

// The earliest and the latest.
template <class Team, int kHeld>
__device__ uint2 range_of(TeamReduce<Team>& reduce, const unsigned (&keys)[kHeld]) {
  unsigned earliest = kNoKey, latest = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    earliest = keys[j] < earliest ? keys[j] : earliest;
    latest = keys[j] != kNoKey && keys[j] > latest ? keys[j] : latest;
  }
  const unsigned first = reduce.least(earliest);
  return {first, reduce.greatest(latest)};
}

// The wanted-th of them, at least as many, or one that up to `slack` more reach.
template <class Team, int kHeld>
__device__ Bound bound_of(TeamReduce<Team>& reduce, const unsigned (&keys)[kHeld], int wanted,
                          int slack) {
  const uint2 range = range_of(reduce, keys);
  return bisect(range.x, range.y, wanted, slack,
                [&](unsigned v) { return count_to(reduce, keys, v); });
}

}  // namespace sparsekern::cuda
