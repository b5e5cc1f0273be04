// What exceeds the threshold of its channel, without the zeros around it: one pass that counts, a
// scan of the counts, and one that writes where there is something to write.
#include "cuda/common/dtypes.cuh"
#include "cuda/common/scan.cuh"
#include "cuda/kernels.h"
#include "cuda/threshold_relu/excess.cuh"

namespace sparsekern::cuda {

namespace {

static_assert(kChannelThreads == kScanThreads, "block_prefix serves both");

// Packs of a thread: its elements fit in one mask of 32 bits, and 16 KiB are under way in a block.
constexpr int kPacks = 4;
template <class T>
constexpr int kPackSize = kVectorBytes / static_cast<int>(sizeof(T));
// Elements of a block at a time: 4096 of float32, 8192 of the others.
template <class T>
constexpr int kTile = kChannelThreads * kPacks * kPackSize<T>;
static_assert(kTile<__half> <= kMostLocal && kTile<float> <= kMostLocal, "for local_quotient");
// Below this many channels a block counts them in shared memory (16 KiB) over all its tiles.
constexpr int64_t kSharedChannels = 4096;

template <class T>
struct Source {
  Channels<T> t;
  Limits limits;
  int64_t size;
  bool packed;  // whether the packs are aligned
};

// An element's channel, and its place in the run. Found once for the start of a tile, and counted
// from there for each pack.
struct Place {
  int64_t channel, s;
};

template <class T>
__device__ Place place_of(const Channels<T>& t, int64_t element) {
  const int64_t run = quotient(element, t.inner);
  return {run - quotient(run, t.channels) * t.channels, element - run * t.inner};
}

template <class T>
__device__ Place place_after(const Channels<T>& t, const Place& start, int local) {
  const int64_t s = start.s + local;
  const int64_t runs = local_quotient(s, t.inner);
  const int64_t channel = start.channel + runs;
  return {channel - local_quotient(channel, t.channels) * t.channels, s - runs * t.inner};
}

// Where the thread's pack number `pack` begins in the tile: a warp owns neighbouring elements, and
// its lanes' packs lie side by side.
template <class T>
__device__ int local_of(int pack) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  return ((warp * kPacks + pack) * kWarp + lane) * kPackSize<T>;
}

template <class T>
__device__ void load_tile(const Source<T>& source, int64_t begin,
                          Pack<T, kPackSize<T>> (&x)[kPacks]) {
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t first = begin + local_of<T>(pack);
    if (source.packed && first + kPackSize<T> <= source.size) {
      x[pack].load(source.t.x + first);
    } else {
#pragma unroll
      for (int c = 0; c < kPackSize<T>; ++c) {
        if (first + c < source.size) x[pack].item[c] = source.t.x[first + c];
      }
    }
  }
}

// The pack's active elements as a mask. tell(channel, count) is called for each channel of the pack
// that has some.
template <class T, class Tell>
__device__ unsigned mark(const Source<T>& source, int64_t begin, const Place& start, int pack,
                         const Pack<T, kPackSize<T>>& x, const Tell& tell) {
  const int local = local_of<T>(pack);
  if (begin + local >= source.size) return 0;
  Place place = place_after(source.t, start, local);
  Limit limit = limit_of(source.limits, place.channel);
  unsigned mask = 0;
  int here = 0;  // active elements of the channel
#pragma unroll
  for (int c = 0; c < kPackSize<T>; ++c) {
    if (begin + local + c >= source.size) break;
    float excess = 0.0f;
    if (limit.exceeded_by(to_float(x.item[c]), &excess)) {
      mask |= 1u << c;
      ++here;
    }
    if (++place.s < source.t.inner || c + 1 == kPackSize<T>) continue;
    if (here != 0) tell(place.channel, here);
    here = 0;
    place.s = 0;
    if (++place.channel == source.t.channels) place.channel = 0;
    limit = limit_of(source.limits, place.channel);
  }
  if (here != 0) tell(place.channel, here);
  return mask;
}

// sums[tile] = active elements of the tile, counts[c] += those of channel c. A block takes every
// (blocks)-th tile of 16 KiB. Bound by reading x, as long as few elements are active; each of these
// costs an addition to its channel's counter, in shared memory where the channels fit.
template <class T, bool kShared>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_codes_count_kernel(Source<T> source, int64_t tiles, int64_t* sums,
                                 unsigned long long* counts) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, own);
  const int channels = kShared ? static_cast<int>(source.t.channels) : 0;
  for (int c = threadIdx.x; c < channels; c += kChannelThreads) own[c] = 0;
  __syncthreads();
  const auto tell = [&](int64_t channel, int count) {
    if (kShared) {
      atomicAdd(&own[channel], static_cast<unsigned>(count));
    } else {
      atomicAdd(&counts[channel], static_cast<unsigned long long>(count));
    }
  };
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kTile<T>;
    const Place start = place_of(source.t, begin);
    Pack<T, kPackSize<T>> x[kPacks];
    load_tile(source, begin, x);
    int active = 0;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      active += __popc(mark(source, begin, start, pack, x[pack], tell));
    }
    int total = 0;
    block_prefix(active, &total);
    if (threadIdx.x == 0) sums[tile] = total;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += kChannelThreads) {
    if (own[c] != 0) atomicAdd(&counts[c], static_cast<unsigned long long>(own[c]));
  }
}

// The codes of a pack from `position` on.
template <class T>
__device__ void write_pack(const Source<T>& source, const Place& start, int64_t begin, int local,
                           const Pack<T, kPackSize<T>>& x, unsigned mask, int64_t position,
                           int64_t capacity, T* values, int64_t* indices) {
#pragma unroll
  for (int c = 0; c < kPackSize<T>; ++c) {
    if ((mask >> c & 1u) == 0) continue;
    if (position < capacity) {
      const Place place = place_after(source.t, start, local + c);
      float excess = 0.0f;
      limit_of(source.limits, place.channel).exceeded_by(to_float(x.item[c]), &excess);
      from_float(excess, &values[position]);
      indices[position] = begin + local + c;
    }
    ++position;
  }
}

// values, indices of a tile's active elements, from starts[tile] on. A block owns a tile and leaves
// it unread when nothing in it is active, or no room is left; else it is bound by reading x again.
template <class T>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_codes_write_kernel(Source<T> source, const int64_t* starts, int64_t capacity,
                                 T* values, int64_t* indices) {
  __shared__ int warp_sums[kChannelWarps];
  const int64_t first = starts[blockIdx.x];
  if (first == starts[blockIdx.x + 1] || first >= capacity) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile<T>;
  const Place start = place_of(source.t, begin);
  Pack<T, kPackSize<T>> x[kPacks];
  load_tile(source, begin, x);
  unsigned mask[kPacks];
  int active = 0;
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    mask[pack] = mark(source, begin, start, pack, x[pack], [](int64_t, int) {});
    active += __popc(mask[pack]);
  }
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  active = __reduce_add_sync(kFullMask, active);
  if (lane == 0) warp_sums[warp] = active;
  __syncthreads();
  int64_t position = first;
  for (int w = 0; w < warp; ++w) position += warp_sums[w];
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int own = __popc(mask[pack]);
    const int upto = warp_sum_upto(own);
    write_pack(source, start, begin, local_of<T>(pack), x[pack], mask[pack], position + upto - own,
               capacity, values, indices);
    position += __shfl_sync(kFullMask, upto, kWarp - 1);
  }
}

template <class T>
void find_codes(const Source<T>& source, int64_t capacity, T* values, int64_t* indices,
                int64_t* counts, void* workspace, cudaStream_t stream) {
  const int64_t tiles = divide_up(source.size, kTile<T>);
  int64_t* starts = static_cast<int64_t*>(workspace);  // [tiles + 1]
  int64_t* scratch = starts + tiles + 1;
  auto* unsigned_counts = reinterpret_cast<unsigned long long*>(counts);
  check(cudaMemsetAsync(starts + tiles, 0, sizeof(int64_t), stream),
        "threshold_codes: cudaMemsetAsync");
  // A block counts fewer than 2^32 elements of a channel as long as there are fewer than 2^42.
  const int64_t most = 2 * kFillBlocks;
  const unsigned grid = static_cast<unsigned>(tiles < most ? tiles : most);
  if (source.t.channels <= kSharedChannels) {
    const size_t shared_bytes = static_cast<size_t>(source.t.channels) * sizeof(unsigned);
    launch(threshold_codes_count_kernel<T, true>, grid, kChannelThreads, shared_bytes, stream,
           source, tiles, starts, unsigned_counts);
  } else {
    launch(threshold_codes_count_kernel<T, false>, grid, kChannelThreads, 0, stream, source, tiles,
           starts, unsigned_counts);
  }
  exclusive_scan(starts, tiles + 1, scratch, stream);
  if (capacity == 0) return;
  launch(threshold_codes_write_kernel<T>, grid_of(tiles), kChannelThreads, 0, stream, source,
         starts, capacity, values, indices);
}

}  // namespace

int64_t threshold_codes_workspace(const ThresholdCodesArguments& call) {
  int64_t bytes = 0;
  visit_dtype("threshold_codes", call.x.dtype, [&](auto value) {
    const int64_t size = divide_up(call.x.count(), kTile<decltype(value)>) + 1;
    bytes = (size + scan_scratch(size)) * static_cast<int64_t>(sizeof(int64_t));
  });
  return bytes;
}

void threshold_codes(const ThresholdCodesArguments& call, void* workspace, cudaStream_t stream) {
  if (call.x.count() == 0) return;
  visit_dtype("threshold_codes", call.x.dtype, [&](auto value) {
    using T = decltype(value);
    const Source<T> source{make_channels<T>(call.x),
                           make_limits(call.threshold, call.scale, call.shift), call.x.count(),
                           reinterpret_cast<uintptr_t>(call.x.data) % kVectorBytes == 0};
    find_codes(source, call.capacity, static_cast<T*>(call.values), call.indices, call.counts,
               workspace, stream);
  });
}

}  // namespace sparsekern::cuda
