// Forward: sparse codes times a row-major dictionary. Column-major: columns.cuh.
#include "cuda/common/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/sparse_matmul/columns.cuh"

namespace sparsekern::cuda {

namespace {

// Rows in a block, one per warp. Small blocks start and end at different times, which keeps the
// loads of an SM spread out.
constexpr int kRowsPerBlock = 4;
// Dictionary rows a warp reads at once: 8 loads of 512 bytes.
constexpr int kRowsAtOnce = 8;
// Blocks that the registers must leave room for. Six allow 80 registers, enough for the 8 loads to
// stay together on every architecture (64 spill on sm_100): without a bound the compiler saves
// registers and keeps two under way. An SM then has 24 warps * 4 KiB under way, twice what hides
// the latency of memory. Single numbers take more registers.
template <bool kVector>
constexpr int kBlocksPerSm = kVector ? 6 : 4;

// The features of one dictionary row that a lane owns. A lane reads 16 bytes, a warp 512 bytes:
// a column block of 65536 latents is 33.5 MB, which the L2 cache holds.
template <class Weight, bool kVector>
struct Features {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Weight));
  static constexpr int kWidth = kCount * kWarp;

  // Distance of the lane's c-th feature from the start of the column block. Without vectors,
  // neighbouring lanes read neighbouring numbers.
  __device__ static int64_t place(int lane, int c) {
    return kVector ? lane * kCount + c : c * kWarp + lane;
  }
  template <class T>
  __device__ static void load(const T* row, int lane, int64_t left, Pack<T, kCount>* x) {
    if (kVector) {
      if (place(lane, 0) < left) x->load(row + place(lane, 0));
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (place(lane, c) < left) x->item[c] = row[place(lane, c)];
      }
    }
  }
  template <class T>
  __device__ static void store(T* row, int lane, int64_t left, const Pack<T, kCount>& x) {
    if (kVector) {
      if (place(lane, 0) < left) x.store(row + place(lane, 0));
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (place(lane, c) < left) row[place(lane, c)] = x.item[c];
      }
    }
  }
};

// sum += value * (features of the dictionary row) for kRowsAtOnce of the 32 entries that the lanes
// hold, in ascending order. An index of -1 is not read, and its value is 0.
template <bool kVector, class Values, class Weight>
__device__ void add_entries(const Product<Values, Weight>& p, const Weight* column, int lane,
                            int64_t left, int first, int index, float value,
                            float (&sum)[Features<Weight, kVector>::kCount]) {
  using Block = Features<Weight, kVector>;
  Pack<Weight, Block::kCount> x[kRowsAtOnce];
#pragma unroll
  for (int j = 0; j < kRowsAtOnce; ++j) {
    const int row = __shfl_sync(kFullMask, index, first + j);
    x[j].clear();
    if (row >= 0) Block::load(column + row * p.stride_n, lane, left, &x[j]);
  }
#pragma unroll
  for (int j = 0; j < kRowsAtOnce; ++j) {
    const float scale = __shfl_sync(kFullMask, value, first + j);
#pragma unroll
    for (int c = 0; c < Block::kCount; ++c) {
      sum[c] = fmaf(scale, to_float(x[j].item[c]), sum[c]);
    }
  }
}

// out[b, features of a column block], one row b per warp. The lanes read the indices and values of
// 32 entries at once and hand them out by shuffles; the dictionary rows are read 512 bytes at a
// time, eight rows at once. Column blocks are the slow dimension of the grid, so all rows share one
// column block of the dictionary in the L2 cache: memory sees the dictionary once, and the kernel
// is bound by the L2 cache's bandwidth (rows * k * d weights).
template <bool kVector, class Values, class Weight>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp, kBlocksPerSm<kVector>)
    sparse_matmul_rows_kernel(Product<Values, Weight> p) {
  using Block = Features<Weight, kVector>;
  const int lane = threadIdx.x % kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (b >= p.rows) return;
  for (int64_t feature = static_cast<int64_t>(blockIdx.y) * Block::kWidth; feature < p.d;
       feature += static_cast<int64_t>(gridDim.y) * Block::kWidth) {
    const int64_t left = p.d - feature;
    Pack<Weight, Block::kCount> start;
    start.clear();
    if (p.bias != nullptr) Block::load(p.bias + feature, lane, left, &start);
    float sum[Block::kCount];
#pragma unroll
    for (int c = 0; c < Block::kCount; ++c) sum[c] = to_float(start.item[c]);
    for (int64_t first = 0; first < p.k; first += kWarp) {
      const int64_t j = first + lane;
      const int index = j < p.k ? p.indices.at(b * p.k + j) : -1;
      const float value = index >= 0 ? to_float(p.values[b * p.k + j]) : 0.0f;
      const int entries = p.k - first < kWarp ? static_cast<int>(p.k - first) : kWarp;
#pragma unroll 1
      for (int e = 0; e < entries; e += kRowsAtOnce) {
        add_entries<kVector>(p, p.weight + feature, lane, left, e, index, value, sum);
      }
    }
    Pack<Values, Block::kCount> result;
#pragma unroll
    for (int c = 0; c < Block::kCount; ++c) from_float(sum[c], &result.item[c]);
    Block::store(p.out + b * p.d + feature, lane, left, result);
  }
}

template <class Values, class Weight>
void multiply_rows(const Product<Values, Weight>& p, cudaStream_t stream) {
  constexpr int kCount = Features<Weight, true>::kCount;
  const int64_t columns =
      (p.d + Features<Weight, true>::kWidth - 1) / Features<Weight, true>::kWidth;
  const dim3 grid(grid_of((p.rows + kRowsPerBlock - 1) / kRowsPerBlock),
                  static_cast<unsigned>(columns < kMostSlowBlocks ? columns : kMostSlowBlocks));
  const bool vector = packs_fit<kCount>(p.weight, p.stride_n, p.d) &&
                      packs_fit<kCount>(p.bias, 0, p.d) && packs_fit<kCount>(p.out, p.d, p.d);
  if (vector) {
    launch(sparse_matmul_rows_kernel<true, Values, Weight>, grid, kRowsPerBlock * kWarp, 0, stream,
           p);
  } else {
    launch(sparse_matmul_rows_kernel<false, Values, Weight>, grid, kRowsPerBlock * kWarp, 0, stream,
           p);
  }
}

}  // namespace

void sparse_matmul(const SparseMatmulArguments& call, cudaStream_t stream) {
  const Codes& codes = call.codes;
  const Matrix& matrix = call.weight;
  visit_dtypes("sparse_matmul", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
    using Values = decltype(value);
    using Weight = decltype(weight);
    if (codes.rows == 0 || matrix.columns == 0) return;
    const Product<Values, Weight> p{
        static_cast<const Values*>(codes.values),
        make_indices("sparse_matmul", codes.indices, codes.index_type, matrix.rows),
        codes.rows,
        codes.k,
        static_cast<const Weight*>(matrix.data),
        matrix.rows,
        matrix.columns,
        matrix.row_stride,
        matrix.column_stride,
        static_cast<const Weight*>(call.bias),
        static_cast<Values*>(call.out)};
    if (p.d == 1 || p.stride_d == 1) {
      multiply_rows(p, stream);
    } else {
      multiply_columns(p, stream);
    }
  });
}

}  // namespace sparsekern::cuda
