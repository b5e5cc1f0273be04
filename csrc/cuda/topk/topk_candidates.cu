// k <= kCandidateK: one pass over a row, for the best element of each group; then only the groups
// that reach the bound are read again.
//
// On random data k to 1.1 k groups reach the bound, and about as many elements.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/maxima.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kResidentBlocks = 4;  // of a multiprocessor, with 64 registers a thread

// What a team has of its block's shared memory: the candidates, in whose place the groups' keys lie
// before, and a list of numbers, of groups or of selected elements.
template <class Team>
struct Scratch {
  Pair* pairs;
  unsigned* list;
  int* filled;
  int* listed;

  using Room = CandidateRoom<Team>;

  __host__ __device__ static int pair_bytes(int k) {
    const int pairs = Room::pairs(k) * static_cast<int>(sizeof(Pair));
    const int keys = kGroupsHeld * Team::kSize * static_cast<int>(sizeof(unsigned));
    return pairs > keys ? pairs : keys;
  }
  __host__ __device__ static int bytes(int k) {
    return pair_bytes(k) + Room::limit(k) * static_cast<int>(sizeof(unsigned));
  }
  // The team's part of the block's dynamic shared memory; counters: two integers of the team.
  __device__ static Scratch of(unsigned char* memory, int k, int* counters) {
    unsigned char* own = memory + (Team::kSize == kWarp ? threadIdx.x / kWarp * bytes(k) : 0);
    return {reinterpret_cast<Pair*>(own), reinterpret_cast<unsigned*>(own + pair_bytes(k)),
            counters, counters + 1};
  }
};

// Leaves the first k, or all if there are no more, of the elements begin..end of row b in
// scratch.pairs, and perhaps more, up to `most` >= k in all; returns how many. k >= 1.
template <class Team, class T, int kWidth>
__device__ int select(const Batch<T>& batch, int64_t b, int64_t begin, int64_t end, int most,
                      const Scratch<Team>& scratch) {
  const Stretch<T, kWidth> stretch(batch, b, begin, static_cast<unsigned>(end - begin));
  const int k = stretch.count() < static_cast<unsigned>(batch.k) ? stretch.count() : batch.k;
  const Groups<Team> groups(stretch.vectors());
  unsigned* maxima = reinterpret_cast<unsigned*>(scratch.pairs);
  write_maxima(stretch, groups, batch.mask, maxima);
  unsigned keys[kGroupsHeld];  // written by this thread itself
#pragma unroll
  for (int g = 0; g < kGroupsHeld; ++g) {
    keys[g] = g < groups.count ? maxima[g * Team::kSize + Team::self()] : kNoKey;
  }
  const Bound bound = bound_of_maxima(keys, groups, k);

  // Where more groups reach the bound than the list holds, there are many ties: then all vectors
  // are read again, in order, so that later ties are told from earlier ones by the bound.
  const bool few = bound.count <= CandidateRoom<Team>::limit(batch.k);
  if (Team::self() == 0) *scratch.listed = 0;
  Team::sync();
  if (few) {
#pragma unroll
    for (int g = 0; g < kGroupsHeld; ++g) {
      if (keys[g] <= bound.key && g < groups.count) {
        scratch.list[atomicAdd(scratch.listed, 1)] = g * Team::kSize + Team::self();
      }
    }
  }
  Candidates<Team> candidates(scratch.pairs, scratch.filled, k,
                              make_pair_of(bound.key, 0xffffffffu));
  const unsigned count =
      few ? static_cast<unsigned>(*scratch.listed) << groups.shift : stretch.vectors();
  for (unsigned first = 0; first < count; first += Team::kSize) {
    const unsigned i = first + Team::self();
    if (i < count) {
      const unsigned v =
          few ? groups.vector(scratch.list[i >> groups.shift], i & ((1u << groups.shift) - 1)) : i;
      const typename Stretch<T, kWidth>::Vector vector = stretch.load(v);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const unsigned key = key_of(vector.item[c], batch.mask);
        const unsigned at = v * kWidth + c;
        if (key > high_of(candidates.bound()) || at >= stretch.count()) continue;
        const Pair pair = make_pair_of(key, static_cast<unsigned>(begin) + at);
        if (pair < candidates.bound()) candidates.append(pair);
      }
    }
    candidates.settle();
  }
  return candidates.finish(most < k ? k : most);
}

// The codes of row b, of which scratch holds the first k candidates and perhaps more, `count`.
template <class Team, class T>
__device__ void write_selected(const Batch<T>& batch, int64_t b, const Scratch<Team>& scratch,
                               int count, int size) {
  if (count <= CandidateRoom<Team>::kRanked) {
    write_ranked<Team>(batch, b, scratch.pairs, count, scratch.list);
  } else {
    write_codes<Team>(batch, b, scratch.pairs, size, false);
  }
}

// How many candidates may be left for write_selected: all that are ranked, else exactly k.
template <class Team>
__device__ int most_left(int k) {
  return k <= CandidateRoom<Team>::kRanked ? CandidateRoom<Team>::kRanked : k;
}

// A warp owns a row. Of a row of 4096 elements and k = 32 it takes about 250 instructions for the
// maxima (an element and lane: one, a half if it has 16 bits; a vector: six), 500 for ten steps of
// the bisection, 200 to read the groups again and 250 to rank. On an H200 32768 such rows take
// 0.18 ms in float32, whose read takes 0.125, and 0.13 ms in 16 bits: bound by instructions.
template <class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    topk_warp_kernel(Batch<T> batch, int size) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ int counters[kBlockWarps][2];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kBlockWarps + warp;
  if (b >= batch.rows) return;
  const auto scratch = Scratch<WarpTeam>::of(memory, batch.k, counters[warp]);
  const int count =
      select<WarpTeam, T, kWidth>(batch, b, 0, batch.n, most_left<WarpTeam>(batch.k), scratch);
  write_selected(batch, b, scratch, count, size);
}

// A block owns one slice of one row (the row itself when there is one slice). While a block looks
// for its bound, which takes ten steps of a barrier each, three others of its multiprocessor read:
// bound by one read of x where rows are long. On an H200 4096 rows of 65536 elements, k = 64, take
// 0.29 ms in float32, 87 % of the rate of a copy, and 0.17 ms in bfloat16, 74 %.
template <class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    topk_candidates_kernel(Batch<T> batch, unsigned width, Pair* slice_pairs, int size) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ int counters[2];
  const int64_t b = blockIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * width;
  const int64_t end = begin + width < batch.n ? begin + width : batch.n;
  const auto scratch = Scratch<BlockTeam>::of(memory, batch.k, counters);
  const bool alone = gridDim.y == 1;
  const int most = alone ? most_left<BlockTeam>(batch.k) : batch.k;
  const int count = select<BlockTeam, T, kWidth>(batch, b, begin, end, most, scratch);
  if (alone) return write_selected(batch, b, scratch, count, size);
  Pair* out = slice_pairs + (b * gridDim.y + blockIdx.y) * batch.k;
  for (int j = threadIdx.x; j < batch.k; j += kBlockThreads) {
    out[j] = j < count ? scratch.pairs[j] : kNoPair;
  }
}

// A block owns one row: the first k of its slices' candidates, in any order. Reads slices * k
// pairs, at most half a megabyte for an n of a million; bound by the latency of that one block.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    topk_merge_kernel(Batch<T> batch, int slices, const Pair* slice_pairs, int size) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ int counters[2];
  constexpr int kStep = CandidateRoom<BlockTeam>::kMostOffered * kBlockThreads;
  const int64_t b = blockIdx.x;
  const int64_t count = static_cast<int64_t>(slices) * batch.k;
  const Pair* own = slice_pairs + b * count;
  const auto scratch = Scratch<BlockTeam>::of(memory, batch.k, counters);
  Candidates<BlockTeam> candidates(scratch.pairs, scratch.filled, batch.k, kNoPair);
  for (int64_t base = 0; base < count; base += kStep) {
    const int64_t end = base + kStep < count ? base + kStep : count;
    for (int64_t i = base + threadIdx.x; i < end; i += kBlockThreads) {
      const Pair pair = own[i];
      if (pair < candidates.bound()) candidates.append(pair);
    }
    candidates.settle();
  }
  const int left = candidates.finish(most_left<BlockTeam>(batch.k));
  write_selected(batch, b, scratch, left, size);
}

template <class T>
void select_by_warps(const TopkCall& call) {
  const auto kernel =
      rows_packed<T>(call) ? topk_warp_kernel<T, kPacked<T>> : topk_warp_kernel<T, 1>;
  const Batch<T> batch = make_batch<T>(call);
  launch(kernel, grid_of((call.x.rows + kBlockWarps - 1) / kBlockWarps), kBlockThreads,
         kBlockWarps * Scratch<WarpTeam>::bytes(batch.k), call.stream, batch,
         static_cast<int>(power_of_two(call.k)));
}

template <class T>
void select_by_blocks(const TopkCall& call, const Slices& slices) {
  const auto kernel =
      rows_packed<T>(call) ? topk_candidates_kernel<T, kPacked<T>> : topk_candidates_kernel<T, 1>;
  const Batch<T> batch = make_batch<T>(call);
  const size_t shared = Scratch<BlockTeam>::bytes(batch.k);
  const int size = static_cast<int>(power_of_two(call.k));
  Pair* workspace = static_cast<Pair*>(call.workspace);
  const int count = static_cast<int>(slices.count);
  launch(kernel, dim3(grid_of(call.x.rows), count), kBlockThreads, shared, call.stream, batch,
         static_cast<unsigned>(slices.width), workspace, size);
  if (slices.count > 1) {
    launch(topk_merge_kernel<T>, grid_of(call.x.rows), kBlockThreads, shared, call.stream, batch,
           count, workspace, size);
  }
}

}  // namespace

int64_t candidates_workspace(int64_t rows, int64_t slices, int64_t k) {
  return slices > 1 ? rows * slices * k * static_cast<int64_t>(sizeof(Pair)) : 0;
}

void topk_candidates_of_warps(const TopkCall& call) {
  visit_dtype("topk", call.x.dtype, [&](auto tag) { select_by_warps<decltype(tag)>(call); });
}

void topk_candidates(const TopkCall& call, const Slices& slices) {
  visit_dtype("topk", call.x.dtype,
              [&](auto tag) { select_by_blocks<decltype(tag)>(call, slices); });
}

}  // namespace sparsekern::cuda
