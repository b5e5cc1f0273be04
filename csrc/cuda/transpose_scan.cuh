// Exclusive prefix sums of an array of int, in place, in one or three launches.
#pragma once

#include <cstdint>

#include "cuda/dtypes.cuh"

namespace sparsekern::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanItems = 8;  // per thread, side by side: a thread reads whole sectors of 32 bytes
constexpr int kScanTile = kScanThreads * kScanItems;
// Up to here one block walks the whole array: four steps, cheaper than two more launches.
constexpr int64_t kScanAlone = 4 * kScanTile;

// The scratch: the total, then a sum per tile.
inline int64_t scan_scratch(int64_t size) { return 1 + (size + kScanTile - 1) / kScanTile; }
inline const int* scan_total(const int* scratch) { return scratch; }

// The sum of x over the block's threads before this one; *total over all of them.
__device__ inline int block_prefix(int x, int* total) {
  __shared__ int warp_sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int inclusive = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kFullMask, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int start = 0;
  int sum = 0;
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    if (w < warp) start += warp_sums[w];
    sum += warp_sums[w];
  }
  *total = sum;
  return start + inclusive - x;
}

// x[0..size) of one tile becomes start + its prefix sums; returns the sum of the tile.
__device__ inline int scan_tile(int* x, int64_t size, int start) {
  int item[kScanItems];
  int sum = 0;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kScanItems;
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    item[i] = first + i < size ? x[first + i] : 0;
    sum += item[i];
  }
  int total = 0;
  int prefix = start + block_prefix(sum, &total);
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    if (first + i < size) x[first + i] = prefix;
    prefix += item[i];
  }
  return total;
}

// sums[tile] = sum of the tile. A block owns a tile of 2048; bound by reading it.
__global__ void __launch_bounds__(kScanThreads)
    scan_sums_kernel(const int* x, int64_t size, int* sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScanTile;
  int sum = 0;
  for (int i = 0; i < kScanItems; ++i) {
    const int64_t place = first + i * kScanThreads + threadIdx.x;
    if (place < size) sum += x[place];
  }
  int total = 0;
  block_prefix(sum, &total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// x = its prefix sums. One block walks the array tile by tile; bound by latency, about a
// microsecond per 2048 numbers.
__global__ void __launch_bounds__(kScanThreads)
    scan_alone_kernel(int* x, int64_t size, int* total) {
  int start = 0;
  for (int64_t first = 0; first < size; first += kScanTile) {
    start += scan_tile(x + first, size - first, start);
  }
  if (threadIdx.x == 0) *total = start;
}

// x = its prefix sums, given those of the tiles. A block owns a tile; bound by reading and writing.
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles_kernel(int* x, int64_t size, const int* sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScanTile;
  scan_tile(x + first, size - first, sums[blockIdx.x]);
}

// The sum over all of x is below 2^31 and ends in *scan_total(scratch).
inline void exclusive_scan(int* x, int64_t size, int* scratch, cudaStream_t stream) {
  int* total = scratch;
  int* sums = scratch + 1;
  if (size <= kScanAlone) {
    launch(scan_alone_kernel, 1, kScanThreads, 0, stream, x, size, total);
    return;
  }
  const int64_t tiles = (size + kScanTile - 1) / kScanTile;
  launch(scan_sums_kernel, static_cast<unsigned>(tiles), kScanThreads, 0, stream, x, size, sums);
  launch(scan_alone_kernel, 1, kScanThreads, 0, stream, sums, tiles, total);
  launch(scan_tiles_kernel, static_cast<unsigned>(tiles), kScanThreads, 0, stream, x, size, sums);
}

}  // namespace sparsekern::cuda
