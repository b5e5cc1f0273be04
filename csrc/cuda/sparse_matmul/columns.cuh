// Forward: sparse codes times a column-major dictionary (element (i, f) at f * stride + i), for
// example the transpose of the weight of a torch.nn.Linear. Nothing of size [n, d] is copied.
#pragma once

#include "cuda/sparse_matmul/operands.cuh"

namespace sparsekern::cuda {

constexpr int kColumnWarps = 8;
constexpr int kColumnRows = kColumnWarps * kWarp;  // rows of a block at a time, one per thread
// Entries of a row staged at once: 128 bytes of int64 indices.
constexpr int kTileEntries = 16;
// Dictionary features held in shared memory. With the entries' tiles a block takes 98 KB: every
// architecture from sm_80 on allows that, and two blocks fit on an SM with 228 KB.
constexpr int kColumnBytes = 64 * 1024;
// Blocks that keep the largest GPUs busy with two blocks per SM, four times over.
constexpr int64_t kColumnBlocks = 1024;

// 32 rows x kTileEntries, padded so that the lanes of a warp read 32 different banks.
struct EntryTile {
  int index[kWarp][kTileEntries + 1];
  float value[kWarp][kTileEntries + 1];
};

// The same latent of kFeatures neighbouring features.
template <class Weight, int kFeatures>
struct alignas(kFeatures * sizeof(Weight)) LatentFeatures {
  Weight item[kFeatures];
};

// columns[i].item[f] = weight[first + i, feature + f]: the whole block copies, in the order of the
// memory.
template <int kFeatures, class Values, class Weight>
__device__ void stage_columns(const Product<Values, Weight>& p, int64_t first, int latents,
                              int64_t feature, LatentFeatures<Weight, kFeatures>* columns) {
#pragma unroll
  for (int f = 0; f < kFeatures; ++f) {
    if (feature + f >= p.d) continue;
    const Weight* column = p.weight + (feature + f) * p.stride_d + first * p.stride_n;
    for (int i = threadIdx.x; i < latents; i += kColumnRows) {
      columns[i].item[f] = column[i * p.stride_n];
    }
  }
}

// The entries first_entry .. + kTileEntries of the warp's 32 rows; -1 and 0 where there is none.
template <class Values, class Weight>
__device__ void stage_entries(const Product<Values, Weight>& p, int64_t first_row,
                              int64_t first_entry, int lane, EntryTile* tile) {
  const int column = lane % kTileEntries;
#pragma unroll 4
  for (int r = lane / kTileEntries; r < kWarp; r += kWarp / kTileEntries) {
    const int64_t b = first_row + r;
    const int64_t j = first_entry + column;
    const int64_t position = b * p.k + j;
    const int index = b < p.rows && j < p.k ? p.indices.at(position) : -1;
    tile->index[r][column] = index;
    tile->value[r][column] = index >= 0 ? to_float(p.values[position]) : 0.0f;
  }
}

// sum += the products of the row's entries with a latent in first .. first + latents.
template <int kFeatures, class Values, class Weight>
__device__ void add_columns(const Product<Values, Weight>& p, int64_t first_row, int64_t first,
                            int latents, const LatentFeatures<Weight, kFeatures>* columns,
                            EntryTile* tile, float (&sum)[kFeatures]) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t entry = 0; entry < p.k; entry += kTileEntries) {
    __syncwarp();
    stage_entries(p, first_row, entry, lane, tile);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kTileEntries; ++j) {
      const int latent = tile->index[lane][j] - static_cast<int>(first);
      if (latent < 0 || latent >= latents) continue;
      const LatentFeatures<Weight, kFeatures> x = columns[latent];
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        sum[f] = fmaf(tile->value[lane][j], to_float(x.item[f]), sum[f]);
      }
    }
  }
}

// out[a slab of rows, kFeatures features]. A block stages its features of the dictionary in shared
// memory, 64 KiB at a time, and each thread sums one row by gathering from there; so the
// dictionary is read in the order of the memory, although the codes jump about in it. A sum runs
// over the chunks of latents upwards and inside a chunk over the entries in their order. Bound by
// the shared memory's bank conflicts (about 3.5 cycles per 32 products) and by reading all codes
// (n * d * size / 64 KiB) times from the L2 cache.
template <int kFeatures, class Values, class Weight>
__global__ void __launch_bounds__(kColumnRows, 2)
    sparse_matmul_columns_kernel(Product<Values, Weight> p, int chunk_latents) {
  using Group = LatentFeatures<Weight, kFeatures>;
  SPARSEKERN_DYNAMIC_SHARED(Group, columns);
  __shared__ EntryTile tiles[kColumnWarps];
  const int warp = threadIdx.x / kWarp;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kFeatures;
  const bool one_chunk = p.n <= chunk_latents;
  bool staged = false;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kColumnRows; row < p.rows;
       row += static_cast<int64_t>(gridDim.y) * kColumnRows) {
    float sum[kFeatures];
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      sum[f] = p.bias != nullptr && feature + f < p.d ? to_float(p.bias[feature + f]) : 0.0f;
    }
    for (int64_t first = 0; first < p.n; first += chunk_latents) {
      const int latents =
          p.n - first < chunk_latents ? static_cast<int>(p.n - first) : chunk_latents;
      if (!one_chunk || !staged) {
        __syncthreads();
        stage_columns<kFeatures>(p, first, latents, feature, columns);
        __syncthreads();
        staged = true;
      }
      add_columns<kFeatures>(p, row + warp * kWarp, first, latents, columns, &tiles[warp], sum);
    }
    const int64_t b = row + threadIdx.x;
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      if (b < p.rows && feature + f < p.d) from_float(sum[f], p.out + b * p.d + feature + f);
    }
  }
}

template <int kFeatures, class Values, class Weight>
void launch_columns(const Product<Values, Weight>& p, cudaStream_t stream) {
  constexpr int64_t kGroupBytes = kFeatures * sizeof(Weight);
  const int64_t most = kColumnBytes / kGroupBytes;
  const int chunk = static_cast<int>(p.n < most ? p.n : most);
  const int64_t groups = (p.d + kFeatures - 1) / kFeatures;
  const int64_t row_blocks = (p.rows + kColumnRows - 1) / kColumnRows;
  const int64_t wanted = (kColumnBlocks + groups - 1) / groups;
  const dim3 grid(grid_of(groups),
                  static_cast<unsigned>(wanted < row_blocks ? wanted : row_blocks));
  launch(sparse_matmul_columns_kernel<kFeatures, Values, Weight>, grid, kColumnRows,
         static_cast<size_t>(chunk) * kGroupBytes, stream, p, chunk);
}

// As many neighbouring features per block as leave all latents in one chunk: the codes are then
// read fewer times.
template <class Values, class Weight>
void multiply_columns(const Product<Values, Weight>& p, cudaStream_t stream) {
  const int64_t column_bytes = p.n * static_cast<int64_t>(sizeof(Weight));
  if (column_bytes * 4 <= kColumnBytes) {
    launch_columns<4>(p, stream);
  } else if (column_bytes * 2 <= kColumnBytes) {
    launch_columns<2>(p, stream);
  } else {
    launch_columns<1>(p, stream);
  }
}

}  // namespace sparsekern::cuda
