// The first k of a row's codes and of further elements: the codes are a bound from the start, so
// one read of the elements finds the few that matter.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/maxima.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kUpdateBlocks = 3;  // of a multiprocessor, with 80 registers a thread

// The codes that a row has so far, by ascending index, and the index of x's first column.
template <class T>
struct Running {
  const T* values;
  const int64_t* indices;
  int64_t first;
};

// A team owns a row. A candidate's number is that of its code, or k + its column: ascending numbers
// are ascending indices. Bound by one read of x: in random data a row's slice number s has k / s
// elements that come before the k-th of those before it.
template <class Team, class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, kUpdateBlocks)
    topk_update_kernel(Batch<T> batch, Running<T> running) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, memory);
  __shared__ int counters[kBlockThreads / Team::kSize];
  const int team = static_cast<int>(threadIdx.x) / Team::kSize;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kBlockThreads / Team::kSize) + team;
  if (b >= batch.rows) return;
  const int k = batch.k;
  Pair* pairs = memory + team * CandidateRoom<Team>::pairs(k);
  unsigned latest = 0;
  for (int j = Team::self(); j < k; j += Team::kSize) {
    const unsigned key = key_of(running.values[b * k + j], batch.mask);
    pairs[j] = make_pair_of(key, j);
    latest = key > latest ? key : latest;
  }
  TeamReduce<Team> reduce;
  // Further elements come after codes of the same key.
  Candidates<Team> candidates(pairs, &counters[team], k, make_pair_of(reduce.greatest(latest), 0),
                              k);

  const Stretch<T, kWidth> stretch(batch, b, 0, static_cast<unsigned>(batch.n));
  First<T, kWidth> best(stretch, batch.mask);
  constexpr int kAtOnce = kVectorsAtOnce<kWidth>;
  for (unsigned first = 0; first < stretch.vectors(); first += kAtOnce * Team::kSize) {
    typename Stretch<T, kWidth>::Vector vectors[kAtOnce];
    load_vectors<Team, T, kWidth>(stretch, first, vectors);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) best.add(vectors[u]);
    const bool matters = best.key() < high_of(candidates.bound());
    best.clear();
    if (!Team::any(matters)) continue;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (matters) {
        const unsigned v = first + u * Team::kSize + Team::self();
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          // What lies past the end is the last of the order, and so before no bound.
          const unsigned key = key_of(vectors[u].item[c], batch.mask);
          const Pair pair = make_pair_of(key, static_cast<unsigned>(k) + v * kWidth + c);
          if (pair < candidates.bound()) candidates.append(pair);
        }
      }
      candidates.settle();
    }
  }
  candidates.finish(k);

  for (int i = Team::self(); i < k; i += Team::kSize) {
    const unsigned own = low_of(pairs[i]);
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < k; ++j) rank += low_of(pairs[j]) < own;
    if (own < static_cast<unsigned>(k)) {
      batch.write_code(b, rank, running.values[b * k + own], running.indices[b * k + own]);
    } else {
      const int64_t column = own - static_cast<unsigned>(k);
      batch.write_code(b, rank, batch.row(b)[column * batch.col_stride], running.first + column);
    }
  }
}

template <class Team>
void update_by_teams(const TopkUpdateArguments& arguments, cudaStream_t stream) {
  const int64_t k = arguments.codes.k;
  const TopkCall call{{arguments.x, k, false, arguments.relu, false, arguments.values,
                       arguments.indices, nullptr, nullptr},
                      nullptr,
                      stream};
  constexpr int kTeams = kBlockThreads / Team::kSize;
  const size_t shared = kTeams * CandidateRoom<Team>::pairs(static_cast<int>(k)) * sizeof(Pair);
  visit_dtype("topk_update", call.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = rows_packed<T>(call) ? topk_update_kernel<Team, T, kPacked<T>>
                                             : topk_update_kernel<Team, T, 1>;
    const Running<T> running{static_cast<const T*>(arguments.codes.values),
                             static_cast<const int64_t*>(arguments.codes.indices), arguments.first};
    launch(kernel, grid_of((call.x.rows + kTeams - 1) / kTeams), kBlockThreads, shared, stream,
           make_batch<T>(call), running);
  });
}

}  // namespace

void topk_update_of_warps(const TopkUpdateArguments& call, cudaStream_t stream) {
  update_by_teams<WarpTeam>(call, stream);
}

void topk_update_of_blocks(const TopkUpdateArguments& call, cudaStream_t stream) {
  update_by_teams<BlockTeam>(call, stream);
}

void topk_update(const TopkUpdateArguments& call, cudaStream_t stream) {
  if (call.codes.k > kCandidateK) {
    throw std::runtime_error("topk_update: k must be at most " + std::to_string(kCandidateK) +
                             ", got " + std::to_string(call.codes.k));
  }
  if (call.codes.k == 0) return;
  const bool by_warps = call.codes.k <= kWarpK && call.x.rows >= kWarpRows;
  (by_warps ? topk_update_of_warps : topk_update_of_blocks)(call, stream);
}

}  // namespace sparsekern::cuda
