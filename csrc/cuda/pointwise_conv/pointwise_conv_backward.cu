// The gradients of a sparse 1x1 convolution. The codes are grouped by channel, so that a warp that
// walks along them reads each column of gradients once, for both the values and the weight.
#include "cuda/common/channel_sums.cuh"
#include "cuda/common/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/pointwise_conv/codes.cuh"

namespace sparsekern::cuda {

namespace {

// Outputs of a lane at a time, and codes whose gradients a warp reads at once: 16 loads under way.
constexpr int kOwn = 2;
constexpr int kCodesAtOnce = 8;
constexpr int64_t kOutputsAtOnce = kOwn * kWarp;
// Warps that the codes are dealt to at most: more sums to add up in the end than that do not pay.
constexpr int64_t kMostChunks = 2048;

// Blocks that the registers must leave room for: with more, some are spilled.
constexpr int kBlocksPerSm = 2;

template <class Values, class Weight>
struct Gradients {
  const Values* grad;  // [outer, outputs, inner]
  const Code* codes;   // [count], by channel
  int64_t count, channels, inner, outputs;
  const Weight* weight;
  int64_t stride_outputs, stride_channels;
  int64_t chunk;        // codes of a warp
  float* dots;          // [count]
  float* parts;         // [chunks, 2, outputs]
  Values* grad_values;  // [count]
  Weight* grad_weight;  // [outputs, channels], zeros

  __device__ int64_t end_of(int64_t begin) const {
    return begin + chunk < count ? begin + chunk : count;
  }
};

// The channel whose column of the weight a warp holds, and its sums so far.
template <class Values, class Weight>
struct Column {
  const Gradients<Values, Weight>& p;
  int64_t chunk;
  int before, after;  // channels of the codes next to the chunk
  int64_t output;     // the lane's first
  int channel;
  float weight[kOwn], sum[kOwn];

  __device__ void open(int new_channel) {
    channel = new_channel;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t e = output + k * kWarp;
      const bool inside = channel < p.channels && e < p.outputs;
      weight[k] =
          inside ? to_float(p.weight[e * p.stride_outputs + channel * p.stride_channels]) : 0.0f;
      sum[k] = 0.0f;
    }
  }
  // A channel that lies in one chunk is done; else the chunk leaves its part: the first part is
  // that of a channel which began earlier.
  __device__ void close() const {
    if (channel >= p.channels) return;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t e = output + k * kWarp;
      if (e >= p.outputs) continue;
      if (channel == before) {
        p.parts[chunk * 2 * p.outputs + e] = sum[k];
      } else if (channel == after) {
        p.parts[(chunk * 2 + 1) * p.outputs + e] = sum[k];
      } else {
        from_float(sum[k], &p.grad_weight[e * p.channels + channel]);
      }
    }
  }
};

// The next up to 32 codes, one per lane: adds their gradients to the column's sums, and returns
// the lane's grad . weight.
template <class Values, class Weight>
__device__ float add_codes(const Code& own, int codes, Column<Values, Weight>* column) {
  const Gradients<Values, Weight>& p = column->p;
  const int lane = threadIdx.x % kWarp;
  const int64_t o = quotient(own.site, p.inner);
  const int64_t place = o * (p.outputs - 1) * p.inner + own.site;
  float dot = 0.0f;
#pragma unroll 1
  for (int first = 0; first < codes; first += kCodesAtOnce) {
    Values g[kCodesAtOnce][kOwn];
#pragma unroll
    for (int u = 0; u < kCodesAtOnce; ++u) {
      const Values* grad = p.grad + __shfl_sync(kFullMask, place, first + u);
      const bool there =
          __shfl_sync(kFullMask, own.channel, first + u) < p.channels && first + u < codes;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const int64_t e = column->output + k * kWarp;
        from_float(0.0f, &g[u][k]);
        if (there && e < p.outputs) g[u][k] = __ldg(grad + e * p.inner);
      }
    }
#pragma unroll
    for (int u = 0; u < kCodesAtOnce; ++u) {
      const int channel = __shfl_sync(kFullMask, own.channel, first + u);
      const float value = __shfl_sync(kFullMask, own.value, first + u);
      if (first + u >= codes) break;
      if (channel != column->channel) {
        column->close();
        column->open(channel);
      }
      float product = 0.0f;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        product = fmaf(to_float(g[u][k]), column->weight[k], product);
        column->sum[k] = fmaf(value, to_float(g[u][k]), column->sum[k]);
      }
      product = warp_sum(product);
      if (lane == first + u) dot = product;
    }
  }
  return dot;
}

// Both gradients of the codes. A warp owns a chunk of neighbouring codes, a lane every 32nd output.
// Bound by gathering the gradients at the sites of the codes: each moves 32 bytes per output, where
// these do not lie side by side.
template <class Values, class Weight>
__global__ void __launch_bounds__(kChannelThreads, kBlocksPerSm)
    pointwise_conv_backward_kernel(Gradients<Values, Weight> p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kChannelWarps + threadIdx.x / kWarp;
  const int64_t begin = chunk * p.chunk;
  if (begin >= p.count) return;
  const int64_t end = p.end_of(begin);
  Column<Values, Weight> column{p,
                                chunk,
                                begin > 0 ? p.codes[begin - 1].channel : -1,
                                end < p.count ? p.codes[end].channel : -1,
                                0,
                                0,
                                {},
                                {}};
  for (int64_t slice = 0; slice < p.outputs; slice += kOutputsAtOnce) {
    column.output = slice + lane;
    column.open(p.codes[begin].channel);
    const bool last = slice + kOutputsAtOnce >= p.outputs;
    for (int64_t first = begin; first < end; first += kWarp) {
      const int64_t m = first + lane;
      const Code own = m < end ? p.codes[m] : Code{0, static_cast<int>(p.channels), 0.0f};
      float dot = m < end && slice > 0 ? p.dots[m] : 0.0f;
      dot += add_codes(own, static_cast<int>(end - first < kWarp ? end - first : kWarp), &column);
      if (m >= end) continue;
      if (last) {
        from_float(dot, &p.grad_values[m]);
      } else {
        p.dots[m] = dot;
      }
    }
    column.close();
  }
}

// grad_weight of the channels that reach into the next chunk: a block looks after the one that
// begins in its chunk, if there is such a one, and adds up the parts of 32 outputs in a fixed
// order. Bound by latency.
template <class Values, class Weight>
__global__ void __launch_bounds__(kChannelThreads)
    pointwise_conv_finish_kernel(Gradients<Values, Weight> p) {
  __shared__ float sums[kChannelWarps][kWarp];
  const int64_t chunk = blockIdx.x;
  const int64_t begin = chunk * p.chunk;
  const int64_t end = p.end_of(begin);
  if (end == p.count) return;
  const int channel = p.codes[end].channel;
  if (channel >= p.channels || p.codes[end - 1].channel != channel) return;
  if (begin > 0 && p.codes[begin - 1].channel == channel) return;
  const int64_t beyond = first_not_below(p.count, channel + 1,
                                         [&](int64_t m) -> int64_t { return p.codes[m].channel; });
  const int64_t last = (beyond - 1) / p.chunk;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t e = static_cast<int64_t>(blockIdx.y) * kWarp + lane;
  float sum = 0.0f;
  if (e < p.outputs) {
#pragma unroll 4
    for (int64_t other = chunk + warp; other <= last; other += kChannelWarps) {
      sum += p.parts[(other * 2 + (other == chunk ? 1 : 0)) * p.outputs + e];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || e >= p.outputs) return;
  for (int w = 1; w < kChannelWarps; ++w) sum += sums[w][lane];
  from_float(sum, &p.grad_weight[e * p.channels + channel]);
}

int64_t chunk_of(int64_t count) { return kWarp * divide_up(count, kWarp * kMostChunks); }

// Where the parts of the workspace begin, in bytes.
struct Places {
  int64_t dots, parts, sums, end;
};

Places place_scratch(int64_t count, int64_t outer, int64_t inner, int64_t outputs) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t chunks = count == 0 ? 0 : divide_up(count, chunk_of(count));
  Places places;
  places.dots = count * static_cast<int64_t>(sizeof(Code));
  places.parts = places.dots + (outputs > kOutputsAtOnce ? count : 0) * kFloat;
  places.sums = places.parts + chunks * 2 * outputs * kFloat;
  places.end = places.sums + sums_scratch(outer, outputs, inner) * kFloat;
  return places;
}

void clear(void* data, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream),
        "pointwise_conv_backward: cudaMemsetAsync");
}

template <class Values, class Weight>
void differentiate(const Gradients<Values, Weight>& p, cudaStream_t stream) {
  if (p.count == 0) return;
  const int64_t chunks = divide_up(p.count, p.chunk);
  launch(pointwise_conv_backward_kernel<Values, Weight>, grid_of(divide_up(chunks, kChannelWarps)),
         kChannelThreads, 0, stream, p);
  const int64_t slices = divide_up(p.outputs, kWarp);
  if (slices > 65535) throw std::runtime_error("pointwise_conv takes fewer than 2^21 outputs");
  launch(pointwise_conv_finish_kernel<Values, Weight>,
         dim3(grid_of(chunks), static_cast<unsigned>(slices)), kChannelThreads, 0, stream, p);
}

}  // namespace

int64_t pointwise_conv_backward_workspace(const PointwiseConvBackwardArguments& call) {
  return place_scratch(call.codes.count(), call.outer, call.inner, call.weight.rows).end;
}

void pointwise_conv_backward(const PointwiseConvBackwardArguments& call, void* workspace,
                             cudaStream_t stream) {
  const char* const name = "pointwise_conv_backward";
  const Matrix& matrix = call.weight;
  visit_dtypes(name, call.codes.dtype, matrix.dtype, [&](auto value, auto weight) {
    using Values = decltype(value);
    using Weight = decltype(weight);
    constexpr int64_t kWeightBytes = sizeof(Weight);
    const int64_t outer = call.outer, inner = call.inner, count = call.codes.count();
    const int64_t outputs = matrix.rows, channels = matrix.columns;
    clear(call.grad_weight, outputs * channels * kWeightBytes, stream);
    if (outer * outputs * inner == 0) {
      clear(call.grad_values, count * static_cast<int64_t>(sizeof(Values)), stream);
      clear(call.grad_bias, outputs * kWeightBytes, stream);
      return;
    }
    const Places places = place_scratch(count, outer, inner, outputs);
    char* bytes = static_cast<char*>(workspace);
    Code* codes = reinterpret_cast<Code*>(bytes);
    locate_codes<Values>(list_codes(name, call.codes, outer, channels, inner), codes, stream);
    const Gradients<Values, Weight> p{static_cast<const Values*>(call.grad),
                                      codes,
                                      count,
                                      channels,
                                      inner,
                                      outputs,
                                      static_cast<const Weight*>(matrix.data),
                                      matrix.row_stride,
                                      matrix.column_stride,
                                      count == 0 ? kWarp : chunk_of(count),
                                      reinterpret_cast<float*>(bytes + places.dots),
                                      reinterpret_cast<float*>(bytes + places.parts),
                                      static_cast<Values*>(call.grad_values),
                                      static_cast<Weight*>(call.grad_weight)};
    differentiate(p, stream);
    sum_channels<Values>(call.grad, outer, outputs, inner, static_cast<Weight*>(call.grad_bias),
                         reinterpret_cast<float*>(bytes + places.sums), stream);
  });
}

}  // namespace sparsekern::cuda
