// Keeping the first k, in the total order, of many candidates.
#pragma once

#include "cuda/topk/bound.cuh"

namespace sparsekern::cuda {

// Keys that a thread holds while it tightens a full buffer.
constexpr int kKeysHeld = (2 * kCandidateK + kChunk) / kBlockThreads;

// How many of this thread's keys satisfy test(key, j).
template <class Test>
__device__ int count_held(const unsigned (&keys)[kKeysHeld], int rounds, const Test& test) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < kKeysHeld; ++j) {
    if (j >= rounds) break;
    count += test(keys[j], j);
  }
  return count;
}

// Two groups of candidates for each thread, 512 >= k in all: so k candidates are no later than the
// latest of the groups' best (kNoKey when a group is empty). Returns a proved [low, high].
__device__ inline uint2 key_range(BlockReduce& reduce, const unsigned (&keys)[kKeysHeld]) {
  unsigned best[2] = {kNoKey, kNoKey}, worst = 0;
#pragma unroll
  for (int j = 0; j < kKeysHeld; ++j) {
    best[j % 2] = keys[j] < best[j % 2] ? keys[j] : best[j % 2];
    worst = keys[j] != kNoKey && keys[j] > worst ? keys[j] : worst;
  }
  const unsigned low = reduce.least(best[0] < best[1] ? best[0] : best[1]);
  const unsigned proved = reduce.greatest(best[0] < best[1] ? best[1] : best[0]);
  const unsigned latest = reduce.greatest(worst);
  return {low, proved < latest ? proved : latest};
}

// Keeps the pairs <= last, in any order; returns the latest key among them. A round reads its
// pairs before any of them is overwritten: no more were kept than were read before.
__device__ inline unsigned keep_pairs(Pair* pairs, int* filled, BlockReduce& reduce, Pair last) {
  const int count = *filled;
  __syncthreads();
  if (threadIdx.x == 0) *filled = 0;
  unsigned latest = 0;
  for (int base = 0; base < count; base += kBlockThreads) {
    const int at = base + static_cast<int>(threadIdx.x);
    const Pair pair = at < count ? pairs[at] : kNoPair;
    __syncthreads();
    if (at < count && pair <= last) {
      latest = high_of(pair) > latest ? high_of(pair) : latest;
      pairs[atomicAdd(filled, 1)] = pair;
    }
  }
  return reduce.greatest(latest);  // its barrier also ends the writes
}

// The block's dynamic shared memory holds *filled pairs: keeps exactly the first k, or all if there
// are no more. Returns the pair from which later ones no longer matter. Not inlined: one copy
// serves all kernels of a file. The keys stay in registers during the bisection (20 a thread in a
// full buffer, 1 or 2 after the first chunk), the indices in shared memory: only ties ask for them.
__device__ __noinline__ inline Pair tighten(int* filled, int k) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, pairs);
  const int count = *filled;
  if (count <= k) return kNoPair;
  const int rounds = (count + kBlockThreads - 1) / kBlockThreads;
  unsigned keys[kKeysHeld];
#pragma unroll
  for (int j = 0; j < kKeysHeld; ++j) {
    const int at = j * kBlockThreads + static_cast<int>(threadIdx.x);
    keys[j] = at < count ? high_of(pairs[at]) : kNoKey;
  }
  BlockReduce reduce;
  const auto count_to = [&](unsigned v) {
    return reduce.sum(count_held(keys, rounds, [v](unsigned key, int) { return key <= v; }));
  };
  const uint2 range = key_range(reduce, keys);
  const Bound bound = bisect(range.x, range.y, k, 0, count_to);
  unsigned last_index = 0xffffffffu;
  if (bound.count > k) {
    const int ties = ties_at(bound, k, count_to);
    const auto ties_to = [&](unsigned v) {
      return reduce.sum(count_held(keys, rounds, [&](unsigned key, int j) {
        return key == bound.key && low_of(pairs[j * kBlockThreads + threadIdx.x]) <= v;
      }));
    };
    last_index = bisect(0, 0x7fffffffu, ties, 0, ties_to).key;
  }
  const unsigned latest = keep_pairs(pairs, filled, reduce, make_pair_of(bound.key, last_index));
  return make_pair_of(latest, last_index);
}

// A buffer of pairs in the block's dynamic shared memory that always contains the first k, in the
// total order, of all that was offered. Pairs are appended in any order: the buffer is a set, and
// which pairs are in it does not depend on the order.
class Candidates {
 public:
  // Past limit(k) pairs the buffer is tightened; a whole chunk has room on top of those.
  __device__ __host__ static int limit(int k) {
    return 2 * k > kCandidateK ? 2 * k : static_cast<int>(kCandidateK);
  }
  static size_t bytes(int k) { return (limit(k) + kChunk) * sizeof(Pair); }

  __device__ Candidates(int* filled, int k) : filled_(filled), k_(k) {
    if (threadIdx.x == 0) *filled_ = 0;
    __syncthreads();
  }

  // Pairs matter only before this one.
  __device__ Pair bound() const { return bound_; }

  // Room for `count` pairs of this thread; returns where the first one goes.
  __device__ int reserve(int count) const { return atomicAdd(filled_, count); }

  // For all threads together, after a chunk: `end` is the end of this thread's last place. After
  // the last chunk exactly the first k remain.
  __device__ void settle(int end, bool last) {
    if (__syncthreads_or(end > limit(k_)) || last) bound_ = tighten(filled_, k_);
  }

  __device__ int filled() const { return *filled_; }

 private:
  int* filled_;
  int k_;
  Pair bound_ = kNoPair;
};

}  // namespace sparsekern::cuda
