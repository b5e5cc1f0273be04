// Keeping the first k, in the total order, of many candidates.
#pragma once

#include "cuda/topk/bound.cuh"

namespace sparsekern::cuda {

// How many candidates a buffer holds, and when it has to be tightened.
template <class Team>
struct CandidateRoom {
  // Candidates that are ranked by counting, and so need not be tightened first.
  static constexpr int kRanked = Team::kSize < kBlockThreads ? 2 * kWarp : kBlockThreads;
  static constexpr int kMostK = Team::kSize < kBlockThreads ? kWarpK : kCandidateK;
  static constexpr int kMostOffered = kVectorBytes / 2;  // by a thread, between two settlements

  // Past so many pairs the buffer is tightened; it has room for what a team offers on top of them.
  __host__ __device__ static int limit(int k) { return 2 * k > kRanked ? 2 * k : kRanked; }
  __host__ __device__ static int pairs(int k) { return limit(k) + kMostOffered * Team::kSize; }

  // Keys that a thread holds while it tightens a full buffer.
  static constexpr int kKeysHeld = 2 * kMostK / Team::kSize + kMostOffered;
};

// How many of this thread's keys satisfy test(key, j).
template <int kHeld, class Test>
__device__ int count_held(const unsigned (&keys)[kHeld], int rounds, const Test& test) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    if (j >= rounds) break;
    count += test(keys[j], j);
  }
  return count;
}

// Two groups of candidates for each thread: where they are k or more, k candidates are no later
// than the latest of the groups' best (kNoKey when a group is empty). Returns a proved [low, high].
template <class Team, int kHeld>
__device__ uint2 key_range(TeamReduce<Team>& reduce, const unsigned (&keys)[kHeld], int k) {
  unsigned best[2] = {kNoKey, kNoKey}, worst = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    best[j % 2] = keys[j] < best[j % 2] ? keys[j] : best[j % 2];
    worst = keys[j] != kNoKey && keys[j] > worst ? keys[j] : worst;
  }
  const unsigned low = reduce.least(best[0] < best[1] ? best[0] : best[1]);
  const unsigned latest = reduce.greatest(worst);
  if (k > 2 * Team::kSize) return {low, latest};
  const unsigned proved = reduce.greatest(best[0] < best[1] ? best[1] : best[0]);
  return {low, proved < latest ? proved : latest};
}

// Keeps the pairs <= last, in any order; returns the latest key among them. A round reads its
// pairs before any of them is overwritten: no more were kept than were read before.
template <class Team>
__device__ unsigned keep_pairs(Pair* pairs, int* filled, TeamReduce<Team>& reduce, Pair last) {
  const int count = *filled;
  Team::sync();
  if (Team::self() == 0) *filled = 0;
  unsigned latest = 0;
  for (int base = 0; base < count; base += Team::kSize) {
    const int at = base + Team::self();
    const Pair pair = at < count ? pairs[at] : kNoPair;
    Team::sync();
    if (at < count && pair <= last) {
      latest = high_of(pair) > latest ? high_of(pair) : latest;
      pairs[atomicAdd(filled, 1)] = pair;
    }
  }
  latest = reduce.greatest(latest);
  Team::sync();  // ends the writes
  return latest;
}

// Keeps exactly the first k of the *filled pairs, more than k, that the team has written. Returns
// the pair from which later ones no longer matter. Not inlined: one copy serves all kernels of a
// file. The keys stay in registers during the bisection, the indices in shared memory: only ties
// ask for them.
template <class Team>
__device__ __noinline__ Pair tighten(Pair* pairs, int* filled, int k) {
  constexpr int kHeld = CandidateRoom<Team>::kKeysHeld;
  const int count = *filled;
  const int rounds = (count + Team::kSize - 1) / Team::kSize;
  unsigned keys[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int at = j * Team::kSize + Team::self();
    keys[j] = at < count ? high_of(pairs[at]) : kNoKey;
  }
  TeamReduce<Team> reduce;
  const auto count_to = [&](unsigned v) {
    return reduce.sum(count_held(keys, rounds, [v](unsigned key, int) { return key <= v; }));
  };
  const uint2 range = key_range(reduce, keys, k);
  const Bound bound = bisect(range.x, range.y, k, 0, count_to);
  unsigned last_index = 0xffffffffu;
  if (bound.count > k) {
    const int ties = ties_at(bound, k, count_to);
    const auto ties_to = [&](unsigned v) {
      return reduce.sum(count_held(keys, rounds, [&](unsigned key, int j) {
        return key == bound.key && low_of(pairs[j * Team::kSize + Team::self()]) <= v;
      }));
    };
    last_index = bisect(0, 0x7fffffffu, ties, 0, ties_to).key;
  }
  const unsigned latest = keep_pairs(pairs, filled, reduce, make_pair_of(bound.key, last_index));
  return make_pair_of(latest, last_index);
}

// A buffer of pairs in shared memory that always contains the first k, in the total order, of all
// that was offered. Pairs are appended in any order: the buffer is a set, and which of the first k
// are in it does not depend on the order.
template <class Team>
class Candidates {
 public:
  using Room = CandidateRoom<Team>;

  // pairs: room for Room::pairs(k). Pairs are offered before `bound`.
  __device__ Candidates(Pair* pairs, int* filled, int k, Pair bound)
      : pairs_(pairs), filled_(filled), k_(k), bound_(bound) {
    if (Team::self() == 0) *filled_ = 0;
    Team::sync();
  }

  // Pairs matter only before this one.
  __device__ Pair bound() const { return bound_; }

  // Appends a pair that matters. At most Room::kMostOffered by a thread between two settlements.
  __device__ void append(Pair pair) {
    const int place = atomicAdd(filled_, 1);
    pairs_[place] = pair;
    end_ = place + 1;
  }

  // For all threads of the team together.
  __device__ void settle() {
    if (Team::any(end_ > Room::limit(k_))) keep_first();
    end_ = 0;
  }

  // For all threads together, after a settlement: leaves at most `most` >= k pairs; returns how
  // many. All threads see them.
  __device__ int finish(int most) {
    if (*filled_ > most) keep_first();
    return *filled_;
  }

 private:
  __device__ void keep_first() {
    const Pair tightened = tighten<Team>(pairs_, filled_, k_);
    bound_ = tightened < bound_ ? tightened : bound_;
  }

  Pair* pairs_;
  int* filled_;
  int k_;
  Pair bound_;
  int end_ = 0;
};

}  // namespace sparsekern::cuda
