// What exceeds the threshold of its channel, in a tensor full of zeros.
#include "cuda/common/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/threshold_relu/excess.cuh"

namespace sparsekern::cuda {

namespace {

// Rows that a thread takes before it tells its counts: enough to make these a small part of the
// work, but not so many that a GPU has too few blocks.
constexpr int64_t kMostRows = 32;
constexpr int64_t kLeastBlocks = 2 * kFillBlocks;

template <class T>
struct Rectifier {
  Channels<T> t;
  Limits limits;
  T* y;
  unsigned long long* counts;  // [channels]
};

// Writes the excess of an element; returns whether there is one.
template <class T>
__device__ unsigned rectify(const Limit& limit, T x, T* y) {
  float excess = 0.0f;
  const bool active = limit.exceeded_by(to_float(x), &excess);
  from_float(active ? excess : 0.0f, y);
  return active;
}

// y for one piece of a run, a piece per warp, pieces in the order of memory. Neighbouring lanes
// take neighbouring packs, four under way each. Bound by reading x and writing y; a piece adds to
// its channel's counter at most once, and not at all where nothing is active.
template <class T>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_relu_runs_kernel(Rectifier<T> r, int64_t pieces, bool packed) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kChannelWarps + threadIdx.x / kWarp;
  if (i >= r.t.outer * r.t.channels * pieces) return;
  const int64_t run = pieces == 1 ? i : quotient(i, pieces);
  const int64_t channel = run - quotient(run, r.t.channels) * r.t.channels;
  const int64_t s = (i - run * pieces) * kPiece;
  const int64_t left = r.t.inner - s;
  const int length = static_cast<int>(left < kPiece ? left : kPiece);
  const T* x = r.t.x + run * r.t.inner + s;
  T* y = r.y + run * r.t.inner + s;
  const Limit limit = limit_of(r.limits, channel);
  const Span span = span_of(x, length, packed);
  unsigned active = 0;
  for (int e = lane; e < span.head; e += kWarp) active += rectify(limit, x[e], &y[e]);
  for (int first = lane; first < span.packs; first += kWarp * kPacksAtOnce) {
    Pack<T, kCount> pack[kPacksAtOnce];
#pragma unroll
    for (int u = 0; u < kPacksAtOnce; ++u) {
      const int place = first + u * kWarp;
      if (place < span.packs) pack[u].load(x + span.head + place * kCount);
    }
#pragma unroll
    for (int u = 0; u < kPacksAtOnce; ++u) {
      const int place = first + u * kWarp;
      if (place >= span.packs) break;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        active += rectify(limit, pack[u].item[c], &pack[u].item[c]);
      }
      pack[u].store(y + span.head + place * kCount);
    }
  }
  if (span.tail + lane < length)
    active += rectify(limit, x[span.tail + lane], &y[span.tail + lane]);
  active = __reduce_add_sync(kFullMask, active);
  if (lane == 0 && active != 0) {
    atomicAdd(&r.counts[channel], static_cast<unsigned long long>(active));
  }
}

// kCount neighbouring columns of a row [channels * inner].
template <class T, int kCount>
struct Columns {
  T item[kCount];

  __device__ void load(const T* p) {
    if constexpr (kCount == 1) {
      item[0] = __ldg(p);
    } else {
      Pack<T, kCount> pack;
      pack.load(p);
#pragma unroll
      for (int c = 0; c < kCount; ++c) item[c] = pack.item[c];
    }
  }
  __device__ void store(T* p) const {
    if constexpr (kCount == 1) {
      *p = item[0];
    } else {
      Pack<T, kCount> pack;
#pragma unroll
      for (int c = 0; c < kCount; ++c) pack.item[c] = item[c];
      pack.store(p);
    }
  }
};

// The rows first, first + step, ... of a thread's columns; active[c] += what exceeds.
template <class T, int kCount>
__device__ void rectify_rows(const Rectifier<T>& r, int64_t column, int64_t first, int64_t step,
                             const Limit (&limit)[kCount], unsigned (&active)[kCount]) {
  const int64_t stride = r.t.channels * r.t.inner;
  for (int64_t row = first; row < r.t.outer; row += step * kPacksAtOnce) {
    Columns<T, kCount> x[kPacksAtOnce];
#pragma unroll
    for (int u = 0; u < kPacksAtOnce; ++u) {
      const int64_t own = row + u * step;
      if (own < r.t.outer) x[u].load(r.t.x + own * stride + column);
    }
#pragma unroll
    for (int u = 0; u < kPacksAtOnce; ++u) {
      const int64_t own = row + u * step;
      if (own >= r.t.outer) break;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        active[c] += rectify(limit[c], x[u].item[c], &x[u].item[c]);
      }
      x[u].store(r.y + own * stride + column);
    }
  }
}

// The same for short runs. A block owns `width` packs of columns of a row and every (parts)-th of
// the steps down the rows; a thread keeps to its columns, their limits and their counts. Bound by
// reading x and writing y.
template <class T, int kCount>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_relu_rows_kernel(Rectifier<T> r, int width, int64_t parts) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, own_counts);
  const int64_t columns = r.t.channels * r.t.inner;
  const int64_t begin = blockIdx.x / parts * width * kCount;
  const int64_t end = begin + width * kCount < columns ? begin + width * kCount : columns;
  const int64_t first_channel = begin / r.t.inner;
  const int count = static_cast<int>((end - 1) / r.t.inner - first_channel) + 1;
  for (int i = threadIdx.x; i < count; i += kChannelThreads) own_counts[i] = 0;
  __syncthreads();
  const int rows = kChannelThreads / width;
  const int own_row = static_cast<int>(threadIdx.x) / width;
  const int64_t column = begin + threadIdx.x % width * kCount;
  if (own_row < rows && column < end) {
    Limit limit[kCount];
    unsigned active[kCount];
    int channel[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int64_t own = (column + c) / r.t.inner;
      limit[c] = limit_of(r.limits, own);
      channel[c] = static_cast<int>(own - first_channel);
      active[c] = 0;
    }
    rectify_rows<T, kCount>(r, column, blockIdx.x % parts * rows + own_row, parts * rows, limit,
                            active);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (active[c] != 0) atomicAdd(&own_counts[channel[c]], active[c]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kChannelThreads) {
    if (own_counts[i] == 0) continue;
    atomicAdd(&r.counts[first_channel + i], static_cast<unsigned long long>(own_counts[i]));
  }
}

template <class T, int kCount>
void rectify_short_runs(const Rectifier<T>& r, cudaStream_t stream) {
  const int64_t packs = r.t.channels * r.t.inner / kCount;
  const int64_t sweeps = divide_up(packs, kChannelThreads);
  const int width = static_cast<int>(divide_up(packs, sweeps));
  const int64_t rows = kChannelThreads / width;
  const int64_t side = divide_up(packs, width);
  const int64_t most = divide_up(r.t.outer, rows * kPacksAtOnce);
  int64_t parts = divide_up(r.t.outer, rows * kMostRows);
  if (parts < kLeastBlocks / side) parts = kLeastBlocks / side < most ? kLeastBlocks / side : most;
  const size_t shared_bytes = static_cast<size_t>(width) * kCount * sizeof(unsigned);
  launch(threshold_relu_rows_kernel<T, kCount>, grid_of(side * parts), kChannelThreads,
         shared_bytes, stream, r, width, parts);
}

template <class T>
void rectify_channels(const Rectifier<T>& r, cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  const int64_t columns = r.t.channels * r.t.inner;
  if (r.t.inner < kLongRun) {
    if (packs_fit<kCount>(r.t.x, columns, columns) && packs_fit<kCount>(r.y, columns, columns)) {
      rectify_short_runs<T, kCount>(r, stream);
    } else {
      rectify_short_runs<T, 1>(r, stream);
    }
    return;
  }
  const int64_t pieces = divide_up(r.t.inner, kPiece);
  const int64_t blocks = divide_up(r.t.outer * r.t.channels * pieces, kChannelWarps);
  // x and y are aligned alike, or their packs do not coincide.
  const bool packed =
      (reinterpret_cast<uintptr_t>(r.t.x) - reinterpret_cast<uintptr_t>(r.y)) % kVectorBytes == 0;
  launch(threshold_relu_runs_kernel<T>, grid_of(blocks), kChannelThreads, 0, stream, r, pieces,
         packed);
}

}  // namespace

void threshold_relu(const ThresholdReluArguments& call, cudaStream_t stream) {
  if (call.x.count() == 0) return;
  visit_dtype("threshold_relu", call.x.dtype, [&](auto value) {
    using T = decltype(value);
    rectify_channels<T>(
        {make_channels<T>(call.x), make_limits(call.threshold, call.scale, call.shift),
         static_cast<T*>(call.y), reinterpret_cast<unsigned long long*>(call.counts)},
        stream);
  });
}

}  // namespace sparsekern::cuda
