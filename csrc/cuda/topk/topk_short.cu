// Short rows: a warp per row, all keys in registers.
#include "cuda/topk/bound.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kRowsPerBlock = 4;
constexpr int kShortThreads = kRowsPerBlock * kWarp;

using WarpReduce = TeamReduce<WarpTeam>;

// A proved bound of the k-th key: the k-th of the bests of kPerLane / 8 groups of keys in each
// lane, or a little later. No group is empty, since the row has more than 8 kPerLane elements.
template <int kPerLane>
__device__ unsigned group_bound(WarpReduce& reduce, const unsigned (&keys)[kPerLane], int k) {
  constexpr int kGroups = kPerLane / 8;
  unsigned best[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    best[g] = keys[g];
#pragma unroll
    for (int e = g + kGroups; e < kPerLane; e += kGroups) {
      best[g] = keys[e] < best[g] ? keys[e] : best[g];
    }
  }
  return bound_of(reduce, best, k, k / 8).key;
}

// The bound of a row: exact, or one with k keys up to it.
template <int kPerLane>
__device__ Bound row_bound(WarpReduce& reduce, const unsigned (&keys)[kPerLane], int k) {
  uint2 range = range_of(reduce, keys);
  if constexpr (kPerLane >= 8) {
    // Half as many codes as groups at most, otherwise the bound hardly helps.
    if (k <= kWarp * (kPerLane / 8) / 2) range.y = group_bound(reduce, keys, k);
  }
  return bisect(range.x, range.y, k, 0, [&](unsigned v) { return count_to(reduce, keys, v); });
}

// A warp owns a row of at most 32 kPerLane elements, element 32 e + lane in register e of a lane:
// it reads 32 consecutive elements at a time, all loads independent. A row of 2048 takes about 2000
// instructions of a warp when k <= 128 (5 an element and lane for the key, 2 for a step of the
// bisection over the row, 6 to take), with larger k 20 to 30 steps over the row: bound by
// instructions. On an H200 65536 rows of 1024 elements, k = 32, take 0.56 ms, nine times the read;
// so rows that have groups enough go to topk_candidates.cu, which takes 0.17 ms.
template <class T, int kPerLane>
__global__ void __launch_bounds__(kShortThreads, 5) topk_short_kernel(Batch<T> batch, int size) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, all_pairs);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp;
  if (b >= batch.rows) return;
  Pair* pairs = all_pairs + warp * size;
  const T* row = batch.row(b);
  unsigned keys[kPerLane];
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int i = e * kWarp + lane;
    keys[e] = i < batch.n ? batch.key(row, i) : kNoKey;
  }
  WarpReduce reduce;
  const Bound bound = row_bound(reduce, keys, batch.k);
  int ties = ties_at(bound, batch.k, [&](unsigned v) { return count_to(reduce, keys, v); });
  const unsigned lanes_before = (1u << lane) - 1;
  int taken = 0;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const unsigned tied = __ballot_sync(kFullMask, keys[e] == bound.key);
    const bool take =
        keys[e] < bound.key || (keys[e] == bound.key && __popc(tied & lanes_before) < ties);
    const unsigned takers = __ballot_sync(kFullMask, take);
    if (take)
      pairs[taken + __popc(takers & lanes_before)] = make_pair_of(keys[e], e * kWarp + lane);
    taken += __popc(takers);
    ties -= __popc(tied);
  }
  write_codes<WarpTeam>(batch, b, pairs, size, true);
}

template <class T>
void select_short(const TopkCall& call) {
  const Batch<T> batch = make_batch<T>(call);
  const auto kernel = call.x.columns <= 4 * kWarp    ? topk_short_kernel<T, 4>
                      : call.x.columns <= 16 * kWarp ? topk_short_kernel<T, 16>
                                                     : topk_short_kernel<T, 64>;
  const int size = static_cast<int>(power_of_two(call.k));
  launch(kernel, grid_of((call.x.rows + kRowsPerBlock - 1) / kRowsPerBlock), kShortThreads,
         kRowsPerBlock * size * sizeof(Pair), call.stream, batch, size);
}

}  // namespace

void topk_short(const TopkCall& call) {
  visit_dtype("topk", call.x.dtype, [&](auto tag) { select_short<decltype(tag)>(call); });
}

}  // namespace sparsekern::cuda
