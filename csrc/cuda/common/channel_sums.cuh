// The sum over each channel of a tensor [outer, channels, inner], the same bits every time.
#pragma once

#include "cuda/common/channels.cuh"

namespace sparsekern::cuda {

// Elements from which on a part of a channel is worth a block.
constexpr int64_t kSummedPart = 16384;

// How the channels are divided: a block owns one with long runs, else neighbouring ones of which a
// row fits in its threads; `parts` blocks share what one owns.
struct SumPlan {
  bool runs;
  int64_t owned, parts;
};

inline SumPlan plan_sums(int64_t outer, int64_t channels, int64_t inner) {
  const bool runs = channels == 1 || inner >= kLongRun;
  const int64_t most = runs ? 1 : kChannelThreads / inner;
  const int64_t owned = channels < most ? channels : most;
  const int64_t shared = kFillBlocks / divide_up(channels, owned);
  const int64_t wanted = divide_up(outer * inner * owned, kSummedPart);
  const int64_t parts = shared < wanted ? shared : wanted;
  return {runs, owned, parts < 1 ? 1 : parts};
}

// Floats of scratch.
inline int64_t sums_scratch(int64_t outer, int64_t channels, int64_t inner) {
  if (outer * channels * inner == 0) return 0;
  return channels * plan_sums(outer, channels, inner).parts;
}

template <class T>
struct Adder {
  float sum = 0.0f;

  __device__ bool start(int) { return true; }
  __device__ void add(T x) { sum += to_float(x); }
  __device__ void stop() {}
};

// parts[c, part] = the sum of a part of channel c. A thread adds up what it reads in order, then
// the block adds up its threads in a fixed order. Bound by reading x.
template <class T>
__global__ void __launch_bounds__(kChannelThreads)
    sum_channels_kernel(Channels<T> t, SumPlan plan, float* parts) {
  __shared__ float sums[kChannelThreads];
  const int64_t part = blockIdx.x % plan.parts;
  const int64_t first = blockIdx.x / plan.parts * plan.owned;
  const int64_t left = t.channels - first;
  const int count = static_cast<int>(left < plan.owned ? left : plan.owned);
  Adder<T> adder;
  if (plan.runs) {
    walk_runs(t, first, part, plan.parts, adder);
    const float warp = warp_sum(adder.sum);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = warp;
  } else {
    walk_rows(t, first, count, part, plan.parts, adder);
    sums[threadIdx.x] = adder.sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= count) return;
  // A channel's sums: `inner` side by side in each row of the threads, or one per warp.
  const int inner = plan.runs ? kChannelWarps : static_cast<int>(t.inner);
  const int width = count * inner;
  const int rows = plan.runs ? 1 : kChannelThreads / width;
  float total = 0.0f;
  for (int row = 0; row < rows; ++row) {
    for (int s = 0; s < inner; ++s) total += sums[row * width + threadIdx.x * inner + s];
  }
  parts[(first + threadIdx.x) * plan.parts + part] = total;
}

// sums[c] = the sum of its parts, a warp for each channel. Bound by latency.
template <class Sum>
__global__ void __launch_bounds__(kChannelThreads)
    sum_parts_kernel(const float* parts, int64_t channels, int64_t count, Sum* sums) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannelWarps + threadIdx.x / kWarp;
  if (channel >= channels) return;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += parts[channel * count + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) from_float(sum, &sums[channel]);
}

// The tensor is not empty.
template <class T, class Sum>
void sum_channels(const void* x, int64_t outer, int64_t channels, int64_t inner, Sum* sums,
                  float* scratch, cudaStream_t stream) {
  const Channels<T> t = make_channels<T>(x, outer, channels, inner);
  const SumPlan plan = plan_sums(outer, channels, inner);
  launch(sum_channels_kernel<T>, grid_of(divide_up(channels, plan.owned) * plan.parts),
         kChannelThreads, 0, stream, t, plan, scratch);
  launch(sum_parts_kernel<Sum>, grid_of(divide_up(channels, kChannelWarps)), kChannelThreads, 0,
         stream, scratch, channels, plan.parts, sums);
}

}  // namespace sparsekern::cuda
