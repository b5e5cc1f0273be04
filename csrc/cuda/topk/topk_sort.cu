// Sorting more codes than a block holds: tiles in shared memory, then merges of neighbouring runs.
#include "cuda/topk/batch.cuh"

namespace sparsekern::cuda {

namespace {

// Rows are sorted a few at a time, so that the second buffer of the merges stays small; a single
// row may need more.
constexpr int64_t kSortBytes = int64_t{256} << 20;

int64_t rows_at_once(int64_t rows, int64_t k) {
  const int64_t fit = kSortBytes / (k * static_cast<int64_t>(sizeof(Pair)));
  return fit < 1 ? 1 : (fit < rows ? fit : rows);
}

// A block owns kSharedSort consecutive pairs of a row (fewer at the end of the row) and sorts them
// in place. Bound by 78 steps over shared memory.
__global__ void __launch_bounds__(kBlockThreads)
    topk_sort_tiles_kernel(Pair* pairs, int64_t k, int64_t tiles) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, tile);
  const int64_t first = blockIdx.x % tiles * kSharedSort;
  const int64_t count = k - first < kSharedSort ? k - first : kSharedSort;
  Pair* own = pairs + blockIdx.x / tiles * k + first;
  for (int64_t i = threadIdx.x; i < kSharedSort; i += kBlockThreads) {
    tile[i] = i < count ? own[i] : kNoPair;
  }
  sort_pairs<BlockTeam>(tile, kSharedSort);
  for (int64_t i = threadIdx.x; i < count; i += kBlockThreads) own[i] = tile[i];
}

// Runs of `width` sorted pairs -> runs of 2 width. A thread owns one pair and finds its place by
// counting the pairs before it in the neighbouring run; no two pairs are equal. Bound by the
// latency of log2(width) dependent reads, mostly from the caches.
__global__ void __launch_bounds__(kBlockThreads)
    topk_merge_runs_kernel(const Pair* from, Pair* to, int64_t total, int64_t k, int64_t width) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (e >= total) return;
  const int64_t start = e / k * k;  // of the row
  const int64_t run = (e - start) / width;
  const int64_t own_begin = run * width;
  const int64_t other_begin = (run ^ 1) * width < k ? (run ^ 1) * width : k;
  int64_t low = other_begin;
  int64_t high = other_begin + width < k ? other_begin + width : k;
  const Pair pair = from[e];
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (from[start + middle] < pair) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t before = (e - start - own_begin) + (low - other_begin);
  to[start + (own_begin < other_begin ? own_begin : other_begin) + before] = pair;
}

// A thread owns one code. The pairs may lie in the place of the indices: a thread reads its own
// before it writes there. Bound by one sector of x, and one of the masked row, for each code.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    topk_write_kernel(Batch<T> batch, int64_t first_row, int64_t total, const Pair* pairs) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (e < total) batch.write(first_row + e / batch.k, e % batch.k, low_of(pairs[e]));
}

// Rows first..first + count of the batch.
void sort_rows(const TopkCall& call, int64_t first, int64_t count) {
  const int64_t k = call.k;
  const int64_t total = count * k;
  const int64_t tiles = (k + kSharedSort - 1) / kSharedSort;
  const unsigned grid = grid_of((total + kBlockThreads - 1) / kBlockThreads);
  Pair* pairs = reinterpret_cast<Pair*>(call.indices) + first * k;
  Pair* other = static_cast<Pair*>(call.workspace);
  launch(topk_sort_tiles_kernel, grid_of(count * tiles), kBlockThreads, kSharedSort * sizeof(Pair),
         call.stream, pairs, k, tiles);
  for (int64_t width = kSharedSort; width < k; width *= 2) {
    launch(topk_merge_runs_kernel, grid, kBlockThreads, 0, call.stream, pairs, other, total, k,
           width);
    Pair* merged = other;
    other = pairs;
    pairs = merged;
  }
  visit_dtype("topk", call.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(topk_write_kernel<T>, grid, kBlockThreads, 0, call.stream, make_batch<T>(call), first,
           total, pairs);
  });
}

}  // namespace

int64_t sort_workspace(int64_t rows, int64_t k) {
  if (k <= kSharedSort) return 0;
  return rows_at_once(rows, k) * k * static_cast<int64_t>(sizeof(Pair));
}

void write_sorted(const TopkCall& call) {
  const int64_t step = rows_at_once(call.x.rows, call.k);
  for (int64_t first = 0; first < call.x.rows; first += step) {
    sort_rows(call, first, call.x.rows - first < step ? call.x.rows - first : step);
  }
}

}  // namespace sparsekern::cuda
