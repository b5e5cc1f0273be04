// k <= kCandidateK: one pass over a row in chunks, with a proved bound that only gets better.
//
// The first chunk's elements are all candidates. On random data 512 + k ln(n / kChunk) of a row's
// elements, about, are appended after it.
#include "cuda/topk/candidates.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kPerThread = kChunk / kBlockThreads;
constexpr int kResidentBlocks = 4;  // of a multiprocessor

// The thread's elements of a chunk, as stored: item j is element place(j) of the chunk.
template <class T, bool kPacked>
struct ChunkItems {
  static constexpr int kWidth = kPacked ? kVectorBytes / sizeof(T) : 1;

  T item[kPerThread];

  __device__ static int place(int j) {
    return static_cast<int>(threadIdx.x) * kWidth + j / kWidth * kWidth * kBlockThreads +
           j % kWidth;
  }

  // A warp reads 512 bytes (packed) or 32 elements at a time; all loads are independent.
  // `count` elements of the chunk exist.
  __device__ void load(const T* chunk, int64_t stride, int count) {
    if constexpr (kPacked) {
      if (count == kChunk) {
        const T* own = chunk + place(0);
#pragma unroll
        for (int j = 0; j < kPerThread; j += kWidth) {
          Pack<T, kWidth> pack;
          pack.load(own + j * kBlockThreads);
#pragma unroll
          for (int c = 0; c < kWidth; ++c) item[j + c] = pack.item[c];
        }
        return;
      }
    }
    // Elements that are not packed lie one step apart.
    const T* own = chunk + threadIdx.x * stride;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      from_float(0.0f, &item[j]);
      const T* element = kPacked ? chunk + place(j) : own;
      if (place(j) < count) item[j] = *element;
      own += kBlockThreads * stride;
    }
  }
};

// Appends the thread's elements that are not <= bound: a NaN always, too many when the last of the
// k is a NaN as well. Returns the end of the last place. Few warps get here after the first chunks.
// `base` is the index of the chunk's first element.
template <class T, bool kPacked>
__device__ int append(Pair* pairs, const Candidates& candidates,
                      const ChunkItems<T, kPacked>& items, unsigned mask, float bound,
                      unsigned base, int count) {
  unsigned hits = 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const bool hit = !(compared(items.item[j], mask) <= bound) && items.place(j) < count;
    hits |= static_cast<unsigned>(hit) << j;
  }
  if (hits == 0) return 0;
  int place = candidates.reserve(__popc(hits));
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    if ((hits >> j & 1) == 0) continue;
    pairs[place++] = make_pair_of(key_of(items.item[j], mask), base + items.place(j));
  }
  return place;
}

// A block owns one slice of one row (the row itself when there is one slice), 256 threads with 64
// (float32) or 32 bytes in flight each. 64 registers allow 4 blocks a multiprocessor, the buffer of
// 37 to 41 KiB would allow 5: 64 or 32 KiB are in flight, where 4.3 TB/s and a latency of 0.8 us
// ask for 26 KiB on each of 132 multiprocessors. An element costs its conversion, a mask and a
// comparison, a fifth of the time of its transfer, so this is bound by the bandwidth of one read of
// x. A chunk costs one barrier.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    topk_candidates_kernel(Batch<T> batch, unsigned width, Pair* slice_pairs, int size) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, pairs);
  __shared__ int filled;
  const int64_t b = blockIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * width;
  const int64_t end = begin + width < batch.n ? begin + width : batch.n;
  Candidates candidates(&filled, batch.k);
  for (int64_t base = begin; base < end; base += kChunk) {
    const int count = static_cast<int>(end - base < kChunk ? end - base : kChunk);
    ChunkItems<T, kPacked> items;
    items.load(batch.row(b) + base * batch.col_stride, batch.col_stride, count);
    const float bound = float_of<T>(high_of(candidates.bound()));
    bool any = false;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) any |= !(compared(items.item[j], batch.mask) <= bound);
    const unsigned first = static_cast<unsigned>(base);
    const int last_place =
        any ? append(pairs, candidates, items, batch.mask, bound, first, count) : 0;
    candidates.settle(last_place, base + kChunk >= end);
  }
  if (gridDim.y == 1) {
    write_codes<BlockTeam>(batch, b, pairs, size, false);
    return;
  }
  Pair* out = slice_pairs + (b * gridDim.y + blockIdx.y) * batch.k;
  for (int j = threadIdx.x; j < batch.k; j += kBlockThreads) {
    out[j] = j < candidates.filled() ? pairs[j] : kNoPair;
  }
}

// A block owns one row: the first k of its slices' candidates, in any order. Reads slices * k
// pairs, at most half a megabyte for an n of a million; bound by the latency of that one block.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    topk_merge_kernel(Batch<T> batch, int slices, const Pair* slice_pairs, int size) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, pairs);
  __shared__ int filled;
  const int64_t b = blockIdx.x;
  const int64_t count = static_cast<int64_t>(slices) * batch.k;
  const Pair* own = slice_pairs + b * count;
  Candidates candidates(&filled, batch.k);
  for (int64_t base = 0; base < count; base += kChunk) {
    int last = 0;
    const int64_t end = base + kChunk < count ? base + kChunk : count;
    for (int64_t i = base + threadIdx.x; i < end; i += kBlockThreads) {
      const Pair pair = own[i];
      if (pair >= candidates.bound()) continue;
      const int place = candidates.reserve(1);
      pairs[place] = pair;
      last = place + 1;
    }
    candidates.settle(last, end == count);
  }
  write_codes<BlockTeam>(batch, b, pairs, size, false);
}

template <class T>
void select_candidates(const TopkCall& call, const Slices& slices) {
  const Batch<T> batch = make_batch<T>(call);
  const auto kernel =
      rows_packed<T>(call) ? topk_candidates_kernel<T, true> : topk_candidates_kernel<T, false>;
  const size_t shared = Candidates::bytes(batch.k);
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

void topk_candidates(const TopkCall& call, const Slices& slices) {
  visit_dtype("topk", call.x.dtype,
              [&](auto tag) { select_candidates<decltype(tag)>(call, slices); });
}

}  // namespace sparsekern::cuda
