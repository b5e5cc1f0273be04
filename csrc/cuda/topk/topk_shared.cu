// Rows that fit shared memory, kCandidateK < k <= kSharedSort: one read of x, then bisection over
// the row's keys. Smaller k are better served by the candidates of topk_candidates.cu, which need
// less shared memory than the row.
#include "cuda/topk/ordered.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kGroupsPerThread = 16;  // 4096 groups in a block
constexpr int kGroups = kGroupsPerThread * kBlockThreads;

// Keys of a row in shared memory, filled up to whole 16-byte vectors.
__host__ __device__ inline int whole_vectors(int n) { return (n + 3) / 4 * 4; }

// Row -> keys, 16 bytes at a time when the row is packed.
template <class T>
__device__ void load_keys(const Batch<T>& batch, const T* row, bool packed, unsigned* keys) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int packs = packed ? batch.n / kWidth : 0;
#pragma unroll 4
  for (int p = threadIdx.x; p < packs; p += kBlockThreads) {
    Pack<T, kWidth> pack;
    pack.load(row + static_cast<int64_t>(p) * kWidth);
#pragma unroll
    for (int c = 0; c < kWidth; c += 4) {
      *reinterpret_cast<uint4*>(keys + p * kWidth + c) =
          uint4{key_of(pack.item[c], batch.mask), key_of(pack.item[c + 1], batch.mask),
                key_of(pack.item[c + 2], batch.mask), key_of(pack.item[c + 3], batch.mask)};
    }
  }
#pragma unroll 8
  for (int i = packs * kWidth + threadIdx.x; i < batch.n; i += kBlockThreads) {
    keys[i] = batch.key(row, i);
  }
}

// A proved bound of the k-th key, k <= kGroups / 2 and n >= kGroups: the k-th of the groups'
// bests, or a little later. Group g holds the elements g, g + kGroups, ...
__device__ inline unsigned group_bound(BlockReduce& reduce, const unsigned* keys, int n, int k) {
  unsigned best[kGroupsPerThread];
#pragma unroll
  for (int g = 0; g < kGroupsPerThread; ++g) {
    best[g] = kNoKey;
    for (int i = g * kBlockThreads + threadIdx.x; i < n; i += kGroups) {
      best[g] = keys[i] < best[g] ? keys[i] : best[g];
    }
  }
  return bound_of(reduce, best, k, k / 8).key;
}

// A block owns a row. It reads the row once into up to 128 KiB of shared memory, of which each step
// of the bisection reads all: 1000 clocks for 32768 elements, 6 to 10 steps below a bound from the
// groups, up to 30 without it. So one block a multiprocessor for the longest rows, bound by shared
// memory; four for 8192 elements.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    topk_shared_kernel(Batch<T> batch, bool packed, int size) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, keys);
  const int64_t b = blockIdx.x;
  const int n = batch.n;
  Pair* pairs = reinterpret_cast<Pair*>(keys + whole_vectors(n));
  load_keys(batch, batch.row(b), packed, keys);
  __syncthreads();
  BlockReduce reduce;
  unsigned high = kNoKey >> key_shift<T>;  // no number's key is later
  if (n >= kGroups && batch.k <= kGroups / 2) high = group_bound(reduce, keys, n, batch.k);
  const auto count_to = [&](unsigned v) {
    int count = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kBlockThreads) count += keys[i] <= v;
    return reduce.sum(count);
  };
  const Bound bound = bisect(0, high, batch.k, 0, count_to);
  const int ties = ties_at(bound, batch.k, count_to);
  take_in_order(
      reduce, n, bound, ties, [&](int64_t i) { return keys[i]; },
      [&](int position, int64_t i, unsigned key) {
        pairs[position] = make_pair_of(key, static_cast<unsigned>(i));
      });
  __syncthreads();
  write_codes<BlockTeam>(batch, b, pairs, size, true);
}

template <class T>
void select_shared(const TopkCall& call) {
  const Batch<T> batch = make_batch<T>(call);
  const int size = static_cast<int>(power_of_two(call.k));
  const size_t shared = whole_vectors(batch.n) * sizeof(unsigned) + size * sizeof(Pair);
  launch(topk_shared_kernel<T>, grid_of(call.x.rows), kBlockThreads, shared, call.stream, batch,
         rows_packed<T>(call), size);
}

}  // namespace

void topk_shared(const TopkCall& call) {
  visit_dtype("topk", call.x.dtype, [&](auto tag) { select_shared<decltype(tag)>(call); });
}

}  // namespace sparsekern::cuda
