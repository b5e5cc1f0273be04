// The output of a sparse 1x1 convolution, written once: a block knows which of its sites have
// codes, and writes the bias everywhere else.
#include "cuda/common/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/pointwise_conv/codes.cuh"

namespace sparsekern::cuda {

namespace {

// Sites that a block owns: one load of 16 bytes per thread, so 1024 in float32.
template <class T>
constexpr int kPerThread = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kSites = kChannelThreads * kPerThread<T>;
static_assert(kSites<__half> <= kMostLocal && kSites<float> <= kMostLocal, "for local_quotient");
// From here on a site's neighbours lie in as many bytes as memory moves at least, for each output.
constexpr int64_t kWideRun = 16;
constexpr int64_t kMostSlices = 65535;  // gridDim.y
// Blocks that the registers must leave room for: with three there are 80, and none is spilled.
constexpr int kBlocksPerSm = 3;

template <class Values, class Weight>
struct Convolution {
  const Code* codes;  // [count], by site
  int64_t count;
  int64_t outer, outputs, inner;
  const Weight* weight;
  int64_t stride_outputs, stride_channels;
  const Weight* bias;  // null or [outputs]
  Values* out;         // [outer, outputs, inner]
  int64_t slice;       // outputs of a block

  __device__ float bias_of(int64_t e) const { return bias == nullptr ? 0.0f : to_float(bias[e]); }
};

// The codes of a block's sites: all of them, and where those of each site begin among them, or -1.
struct Tile {
  int64_t first;      // site
  int64_t bounds[2];  // places in the list
};

// starts[i] of the tile's i-th site, for the whole block.
__device__ inline void stage_sites(const Code* codes, int64_t count, int64_t first, int sites,
                                   Tile* tile, int* starts) {
  for (int i = threadIdx.x; i < sites; i += kChannelThreads) starts[i] = -1;
  const int warp = threadIdx.x / kWarp;
  if (warp < 2) {
    const int64_t bound = first_not_below(count, warp == 0 ? first : first + sites,
                                          [&](int64_t m) { return codes[m].site; });
    if (threadIdx.x % kWarp == 0) tile->bounds[warp] = bound;
  }
  if (threadIdx.x == 0) tile->first = first;
  __syncthreads();
  const int64_t begin = tile->bounds[0];
  for (int64_t m = begin + threadIdx.x; m < tile->bounds[1]; m += kChannelThreads) {
    const int64_t site = codes[m].site;
    if (m > begin && codes[m - 1].site == site) continue;
    starts[site - first] = static_cast<int>(m - begin);
  }
  __syncthreads();
}

// *out = bias[e] + sum of value * weight[e, channel] over the codes of one site, given where they
// start.
template <class Values, class Weight>
__device__ void convolve(const Convolution<Values, Weight>& p, const Tile& tile, int start,
                         int64_t e, Values* out) {
  float sum = p.bias_of(e);
  const Weight* weight = p.weight + e * p.stride_outputs;
  int64_t m = tile.bounds[0] + start;
  const int64_t site = p.codes[m].site;
  do {
    const Code code = p.codes[m];
    if (code.site != site) break;
    sum = fmaf(code.value, to_float(weight[code.channel * p.stride_channels]), sum);
  } while (++m < tile.bounds[1]);
  from_float(sum, out);
}

// out of a block's sites for a slice of the outputs. A thread keeps to its sites, side by side
// where packs are aligned, and walks over the outputs: it writes the bias everywhere, then its own
// sites with codes once more. Bound by writing out, once.
template <bool kVector, class Values, class Weight>
__global__ void __launch_bounds__(kChannelThreads, kBlocksPerSm)
    pointwise_conv_sites_kernel(Convolution<Values, Weight> p) {
  constexpr int kOwn = kPerThread<Values>;
  __shared__ int starts[kSites<Values>];
  __shared__ Tile tile;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSites<Values>;
  const int64_t left = p.outer * p.inner - first;
  const int sites = static_cast<int>(left < kSites<Values> ? left : kSites<Values>);
  stage_sites(p.codes, p.count, first, sites, &tile, starts);
  const int64_t first_o = quotient(first, p.inner);
  const int64_t first_s = first - first_o * p.inner;
  Values* out[kOwn];
  int start[kOwn];
  bool any = false;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    const int i = kVector ? threadIdx.x * kOwn + c : c * kChannelThreads + threadIdx.x;
    start[c] = i < sites ? starts[i] : -1;
    any = any || start[c] >= 0;
    const int64_t o = first_o + local_quotient(first_s + i, p.inner);
    out[c] = i < sites ? p.out + o * (p.outputs - 1) * p.inner + first + i : nullptr;
  }
  const int64_t begin = blockIdx.y * p.slice;
  const int64_t end = begin + p.slice < p.outputs ? begin + p.slice : p.outputs;
  for (int64_t e = begin; e < end; ++e) {
    Pack<Values, kOwn> result;
    from_float(p.bias_of(e), &result.item[0]);
    if (kVector) {
#pragma unroll
      for (int c = 1; c < kOwn; ++c) result.item[c] = result.item[0];
      if (out[0] != nullptr) result.store(out[0] + e * p.inner);
    } else {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        if (out[c] != nullptr) out[c][e * p.inner] = result.item[0];
      }
    }
    if (!any) continue;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (start[c] >= 0) convolve(p, tile, start[c], e, out[c] + e * p.inner);
    }
  }
}

// The rows of one thread's columns, e and s fixed.
template <int kCount, class Values, class Weight>
__device__ void write_rows(const Convolution<Values, Weight>& p, const Tile& tile,
                           const int* starts, int64_t column, int row, int step, int rows) {
  const int inner = static_cast<int>(p.inner);
  const int64_t e = quotient(column, p.inner);
  const int s = static_cast<int>(column - e * p.inner);
  Pack<Values, kPerThread<Values>> result;
#pragma unroll
  for (int c = 0; c < kCount; ++c) from_float(p.bias_of(e + (s + c) / inner), &result.item[c]);
  for (; row < rows; row += step) {
    Values* out = p.out + tile.first * p.outputs + row * p.outputs * p.inner + column;
    if (kCount == 1) {
      *out = result.item[0];
    } else {
      result.store(out);
    }
    int64_t own_e = e;
    int own_s = s;
#pragma unroll 1
    for (int c = 0; c < kCount; ++c) {
      const int start = starts[row * inner + own_s];
      if (start >= 0) convolve(p, tile, start, own_e, out + c);
      if (++own_s < inner) continue;
      own_s = 0;
      ++own_e;
    }
  }
}

// The same for short runs. A block owns neighbouring rows [outputs * inner]; a thread keeps to
// kCount columns and walks down the rows. Bound by writing out, once.
template <int kCount, class Values, class Weight>
__global__ void __launch_bounds__(kChannelThreads, kBlocksPerSm)
    pointwise_conv_rows_kernel(Convolution<Values, Weight> p) {
  __shared__ int starts[kSites<Values>];
  __shared__ Tile tile;
  const int64_t most = kSites<Values> / p.inner;
  const int64_t first = blockIdx.x * most;
  const int rows = static_cast<int>(p.outer - first < most ? p.outer - first : most);
  const int inner = static_cast<int>(p.inner);
  stage_sites(p.codes, p.count, first * p.inner, rows * inner, &tile, starts);
  const int64_t begin = blockIdx.y * p.slice * p.inner;
  const int64_t all = p.outputs * p.inner;
  const int64_t end = begin + p.slice * p.inner < all ? begin + p.slice * p.inner : all;
  const int64_t packs = (end - begin) / kCount;
  const int64_t sweeps = (packs + kChannelThreads - 1) / kChannelThreads;
  const int width = static_cast<int>((packs + sweeps - 1) / sweeps);
  const int at_once = kChannelThreads / width;
  const int row = static_cast<int>(threadIdx.x) / width;
  if (row >= at_once) return;
  for (int64_t pack = threadIdx.x % width; pack < packs; pack += width) {
    write_rows<kCount>(p, tile, starts, begin + pack * kCount, row, at_once, rows);
  }
}

template <class Values, class Weight>
void convolve_all(Convolution<Values, Weight> p, cudaStream_t stream) {
  constexpr int kOwn = kPerThread<Values>;
  const bool wide = p.inner >= kWideRun;
  const int64_t blocks = wide ? divide_up(p.outer * p.inner, kSites<Values>)
                              : divide_up(p.outer, kSites<Values> / p.inner);
  int64_t slices = kFillBlocks / blocks;
  slices = slices < 1 ? 1 : slices < p.outputs ? slices : p.outputs;
  slices = slices < kMostSlices ? slices : kMostSlices;
  p.slice = divide_up(p.outputs, slices);
  // A row's part of a slice in whole packs, and at least 64 bytes of it.
  if (!wide) p.slice = divide_up(p.slice, 4 * kOwn) * 4 * kOwn;
  const dim3 grid(grid_of(blocks), static_cast<unsigned>(divide_up(p.outputs, p.slice)));
  const int64_t row = p.outputs * p.inner;
  const auto kernel = wide ? (packs_fit<kOwn>(p.out, p.inner, p.inner)
                                  ? pointwise_conv_sites_kernel<true, Values, Weight>
                                  : pointwise_conv_sites_kernel<false, Values, Weight>)
                           : (packs_fit<kOwn>(p.out, row, p.slice * p.inner)
                                  ? pointwise_conv_rows_kernel<kOwn, Values, Weight>
                                  : pointwise_conv_rows_kernel<1, Values, Weight>);
  launch(kernel, grid, kChannelThreads, 0, stream, p);
}

}  // namespace

int64_t pointwise_conv_workspace(const PointwiseConvArguments& call) {
  return call.codes.count() * static_cast<int64_t>(sizeof(Code));
}

void pointwise_conv(const PointwiseConvArguments& call, void* workspace, cudaStream_t stream) {
  const Matrix& matrix = call.weight;
  visit_dtypes("pointwise_conv", call.codes.dtype, matrix.dtype, [&](auto value, auto weight) {
    using Values = decltype(value);
    using Weight = decltype(weight);
    const int64_t outputs = matrix.rows, outer = call.outer, inner = call.inner;
    if (outer * outputs * inner == 0) return;
    Code* codes = static_cast<Code*>(workspace);
    const CodeList list = list_codes("pointwise_conv", call.codes, outer, matrix.columns, inner);
    locate_codes<Values>(list, codes, stream);
    // With one output, out is one run of sites.
    const bool one = outputs == 1;
    convolve_all<Values, Weight>(
        {codes, list.count, one ? 1 : outer, outputs, one ? outer * inner : inner,
         static_cast<const Weight*>(matrix.data), matrix.row_stride, matrix.column_stride,
         static_cast<const Weight*>(call.bias), static_cast<Values*>(call.out), outputs},
        stream);
  });
}

}  // namespace sparsekern::cuda
