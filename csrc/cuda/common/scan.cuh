// Exclusive prefix sums of an array of integers, in place, in one or three launches.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"

namespace sparsekern::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanItems = 8;  // per thread, side by side: a thread reads whole sectors of 32 bytes
constexpr int kScanTile = kScanThreads * kScanItems;
// Up to here one block walks the whole array: four steps, cheaper than two more launches.
constexpr int64_t kScanAlone = 4 * kScanTile;

// The scratch, in integers: the total, then a sum per tile.
inline int64_t scan_scratch(int64_t size) { return 1 + (size + kScanTile - 1) / kScanTile; }
template <class Int>
const Int* scan_total(const Int* scratch) {
  return scratch;
}

// The sum of x over the block's threads before this one; *total over all of them.
template <class Int>
__device__ Int block_prefix(Int x, Int* total) {
  __shared__ Int warp_sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const Int inclusive = warp_sum_upto(x);
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  Int start = 0;
  Int sum = 0;
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    if (w < warp) start += warp_sums[w];
    sum += warp_sums[w];
  }
  *total = sum;
  return start + inclusive - x;
}

// x[0..size) of one tile becomes start + its prefix sums; returns the sum of the tile.
template <class Int>
__device__ Int scan_tile(Int* x, int64_t size, Int start) {
  Int item[kScanItems];
  Int sum = 0;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kScanItems;
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    item[i] = first + i < size ? x[first + i] : 0;
    sum += item[i];
  }
  Int total = 0;
  Int prefix = start + block_prefix(sum, &total);
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    if (first + i < size) x[first + i] = prefix;
    prefix += item[i];
  }
  return total;
}

// sums[tile] = sum of the tile. A block owns a tile of 2048; bound by reading it.
template <class Int>
__global__ void __launch_bounds__(kScanThreads)
    scan_sums_kernel(const Int* x, int64_t size, Int* sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScanTile;
  Int sum = 0;
  for (int i = 0; i < kScanItems; ++i) {
    const int64_t place = first + i * kScanThreads + threadIdx.x;
    if (place < size) sum += x[place];
  }
  Int total = 0;
  block_prefix(sum, &total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// x = its prefix sums. One block walks the array tile by tile; bound by latency, about a
// microsecond per 2048 numbers.
template <class Int>
__global__ void __launch_bounds__(kScanThreads)
    scan_alone_kernel(Int* x, int64_t size, Int* total) {
  Int start = 0;
  for (int64_t first = 0; first < size; first += kScanTile) {
    start += scan_tile(x + first, size - first, start);
  }
  if (threadIdx.x == 0) *total = start;
}

// x = its prefix sums, given those of the tiles. A block owns a tile; bound by reading and writing.
template <class Int>
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles_kernel(Int* x, int64_t size, const Int* sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScanTile;
  scan_tile(x + first, size - first, sums[blockIdx.x]);
}

// The sum over all of x fits in an Int and ends in *scan_total(scratch).
template <class Int>
void exclusive_scan(Int* x, int64_t size, Int* scratch, cudaStream_t stream) {
  Int* total = scratch;
  Int* sums = scratch + 1;
  if (size <= kScanAlone) {
    launch(scan_alone_kernel<Int>, 1, kScanThreads, 0, stream, x, size, total);
    return;
  }
  const int64_t tiles = (size + kScanTile - 1) / kScanTile;
  launch(scan_sums_kernel<Int>, static_cast<unsigned>(tiles), kScanThreads, 0, stream, x, size,
         sums);
  launch(scan_alone_kernel<Int>, 1, kScanThreads, 0, stream, sums, tiles, total);
  launch(scan_tiles_kernel<Int>, static_cast<unsigned>(tiles), kScanThreads, 0, stream, x, size,
         sums);
}

}  // namespace sparsekern::cuda
