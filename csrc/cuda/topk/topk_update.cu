// Top-k of rows that come in parts. The k-th of the parts before is a bound from the start: one
// read of the next part finds the few elements that matter, and they are only kept until there are
// too many of them.
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/maxima.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kUpdateBlocks = 3;  // of a multiprocessor, with 80 registers a thread
constexpr int64_t kMostColumns = int64_t(1) << 30;

// An element's pair: its number is twice the index, and one more for -0, which its key forgets.
template <class T>
__device__ Pair pair_of(T x, unsigned key, unsigned index) {
  const bool negative_zero = __float_as_int(to_float(x)) == static_cast<int>(0x80000000u);
  return make_pair_of(key, index << 1 | (negative_zero ? 1u : 0u));
}

template <class T>
__device__ T element_of(Pair pair) {
  T x;
  from_float((low_of(pair) & 1) != 0 ? -0.0f : number_of<T>(high_of(pair)), &x);
  return x;
}

// A row from one call to the next: pairs, in any order, among which are its first k so far, and a
// key that the k-th of them does not come after.
struct State {
  Pair* row;

  __device__ int count() const { return static_cast<int>(low_of(row[0])); }
  __device__ unsigned bound() const { return high_of(row[0]); }
  __device__ Pair* pairs() const { return row + 1; }
  __device__ void set(unsigned bound, int count) const { row[0] = make_pair_of(bound, count); }
};

// What a call gets beside x.
template <class T>
struct Parts {
  const T* values;  // codes of the parts before, or null
  const int64_t* indices;
  Pair* states;
  unsigned first;  // the index of x's first column
  bool last;       // whether the codes are wanted
};

// Makes the codes of row b its state.
template <class Team, class T>
__device__ void begin_state(const Batch<T>& batch, const Parts<T>& parts, int64_t b,
                            const State& state) {
  unsigned latest = 0;
  for (int j = Team::self(); j < batch.k; j += Team::kSize) {
    const T x = parts.values[b * batch.k + j];
    const unsigned key = key_of(x, kSigned);
    state.pairs()[j] = pair_of(x, key, static_cast<unsigned>(parts.indices[b * batch.k + j]));
    latest = key > latest ? key : latest;
  }
  TeamReduce<Team> reduce;
  latest = reduce.greatest(latest);
  if (Team::self() == 0) state.set(latest, batch.k);
  Team::sync();
}

// Offers the elements of x that come before the bound.
template <class Team, class T, int kWidth>
__device__ void offer(const Batch<T>& batch, const Stretch<T, kWidth>& stretch,
                      unsigned first_index, Candidates<Team>& candidates) {
  constexpr int kAtOnce = kVectorsAtOnce<kWidth> / 2;  // more would not fit into the registers
  First<T, kWidth> best(stretch, kSigned);
  float least = float_of<T>(high_of(candidates.bound()));
  for (unsigned first = 0; first < stretch.vectors(); first += kAtOnce * Team::kSize) {
    typename Stretch<T, kWidth>::Vector vectors[kAtOnce];
    load_vectors<Team>(stretch, first, vectors);
    unsigned matters = 0;  // a bit for each vector
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      best.clear();
      best.add(vectors[u]);
      matters |= static_cast<unsigned>(best.exceeds(least)) << u;
    }
    if (!Team::any(matters != 0)) continue;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if ((matters >> u & 1) != 0) {
        const unsigned at = first_index + (first + u * Team::kSize + Team::self()) * kWidth;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const T x = vectors[u].item[c];
          if (to_float(x) <= least) continue;
          // What lies past the end is the last of the order, and so before no bound. Of the same
          // key come first those of the parts before.
          const unsigned key = key_of(x, kSigned);
          if (key < high_of(candidates.bound())) candidates.append(pair_of(x, key, at + c));
        }
      }
      candidates.settle();
    }
    least = float_of<T>(high_of(candidates.bound()));
  }
}

// A team owns a row. Bound by one read of x: of random rows part number p has k / p elements that
// come before the k-th of the parts before, and the state is tightened when they have become k.
template <class Team, class T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, kUpdateBlocks)
    topk_update_kernel(Batch<T> batch, Parts<T> parts) {
  using Room = CandidateRoom<Team>;
  static_assert(2 * Room::kMostK <= Room::kMostOffered * Team::kSize, "a state fits at once");
  SPARSEKERN_DYNAMIC_SHARED(Pair, memory);
  __shared__ int counters[kBlockThreads / Team::kSize];
  const int team = static_cast<int>(threadIdx.x) / Team::kSize;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kBlockThreads / Team::kSize) + team;
  if (b >= batch.rows) return;
  const int k = batch.k;
  Pair* pairs = memory + team * Room::pairs(k);
  const State state{parts.states + b * (1 + 2 * k)};
  if (parts.values != nullptr) begin_state<Team>(batch, parts, b, state);
  const int before = state.count();
  Candidates<Team> candidates(pairs, &counters[team], k, make_pair_of(state.bound(), 0));
  const Stretch<T, kWidth> stretch(batch, b, 0, static_cast<unsigned>(batch.n));
  offer(batch, stretch, parts.first, candidates);
  const int fresh = counters[team];
  Team::sync();
  if (!parts.last && before + fresh <= 2 * k) {
    for (int i = Team::self(); i < fresh; i += Team::kSize) state.pairs()[before + i] = pairs[i];
    if (Team::self() == 0) state.set(high_of(candidates.bound()), before + fresh);
    return;
  }
  for (int j = Team::self(); j < before; j += Team::kSize) candidates.append(state.pairs()[j]);
  candidates.settle();
  candidates.finish(k);
  if (!parts.last) {
    for (int i = Team::self(); i < k; i += Team::kSize) state.pairs()[i] = pairs[i];
    if (Team::self() == 0) state.set(high_of(candidates.bound()), k);
    return;
  }
  for (int i = Team::self(); i < k; i += Team::kSize) {
    const unsigned own = low_of(pairs[i]);
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < k; ++j) rank += low_of(pairs[j]) < own;
    batch.write_code(b, rank, element_of<T>(pairs[i]), own >> 1);
  }
}

template <class Team>
void update_by_teams(const TopkUpdateArguments& arguments, cudaStream_t stream) {
  const int64_t k = arguments.k;
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
    const Parts<T> parts{static_cast<const T*>(arguments.codes.values),
                         static_cast<const int64_t*>(arguments.codes.indices),
                         reinterpret_cast<Pair*>(arguments.state),
                         static_cast<unsigned>(arguments.first), arguments.values != nullptr};
    launch(kernel, grid_of((call.x.rows + kTeams - 1) / kTeams), kBlockThreads, shared, stream,
           make_batch<T>(call), parts);
  });
}

void require(bool holds, const char* rule, int64_t value) {
  if (holds) return;
  throw std::runtime_error(std::string("topk_update: ") + rule + ", got " + std::to_string(value));
}

}  // namespace

void topk_update_of_warps(const TopkUpdateArguments& call, cudaStream_t stream) {
  update_by_teams<WarpTeam>(call, stream);
}

void topk_update_of_blocks(const TopkUpdateArguments& call, cudaStream_t stream) {
  update_by_teams<BlockTeam>(call, stream);
}

void topk_update(const TopkUpdateArguments& call, cudaStream_t stream) {
  require(call.k >= 1 && call.k <= kCandidateK, "k must lie in 1..512", call.k);
  require(call.first + call.x.columns <= kMostColumns, "indices must be below 2^30",
          call.first + call.x.columns);
  const bool by_warps = call.k <= kWarpK && call.x.rows >= kWarpRows;
  (by_warps ? topk_update_of_warps : topk_update_of_blocks)(call, stream);
}

}  // namespace sparsekern::cuda
