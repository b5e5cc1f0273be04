// Transposition of codes: a stable radix sort of the flat positions by latent.
//
// Each pass sorts by one digit of the latent. A pass counts the digits of every tile of entries,
// turns the counts into the places where each tile's entries of each digit begin, and moves the
// positions there. No result depends on the order in which threads or blocks run, and no step
// depends on how the entries are spread over the latents: one latent in every row costs the same
// as a uniform spread.
#include "cuda/common/indices.cuh"
#include "cuda/common/scan.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Entries of a warp in a tile: 262144 entries (4096 rows of 64) give 128 tiles, one per SM.
constexpr int kWarpEntries = 256;
constexpr int kTile = kWarps * kWarpEntries;
// 2^8 digits: two passes up to 65536 latents, and a thread per digit.
constexpr int kMostDigitBits = 8;
constexpr int kMostDigits = 1 << kMostDigitBits;
static_assert(kMostDigits == kThreads, "a thread looks after one digit");

// One pass over the entries, in the order that the previous pass left.
struct Pass {
  Indices indices;
  const int32_t* order;  // [count] flat positions, or null in the first pass: 0, 1, 2, ...
  const int* listed;     // how many entries `order` has; null in the first pass: all
  int64_t count;
  int shift, digits;
  int64_t tiles;
};

// How many passes, and the bits of a digit: n - 1 is the largest latent.
struct Digits {
  int passes, bits;
};

Digits choose_digits(int64_t n) {
  int bits = 1;
  while (bits < 31 && ((n - 1) >> bits) != 0) ++bits;
  const int passes = (bits + kMostDigitBits - 1) / kMostDigitBits;
  return Digits{passes, (bits + passes - 1) / passes};
}

int64_t count_tiles(int64_t count) { return (count + kTile - 1) / kTile; }

// The flat position of the e-th entry and its digit, or -1 where the index is not valid.
__device__ int read_digit(const Pass& pass, int64_t e, int64_t end, int* position) {
  if (e >= end) return -1;
  *position = pass.order == nullptr ? static_cast<int>(e) : pass.order[e];
  const int latent = pass.indices.at(*position);
  return latent < 0 ? -1 : (latent >> pass.shift) & (pass.digits - 1);
}

__device__ int64_t end_of_entries(const Pass& pass) {
  return pass.listed == nullptr ? pass.count : *pass.listed;
}

// counts[warp][digit] = entries of the warp's part of the tile with that digit. The atomics add
// integers within one warp's counters, so their order does not matter.
__device__ void count_digits(const Pass& pass, int64_t first, int64_t end,
                             int (&counts)[kWarps][kMostDigits]) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int w = 0; w < kWarps; ++w) counts[w][threadIdx.x] = 0;
  __syncthreads();
  for (int i = lane; i < kWarpEntries; i += kWarp) {
    int position = 0;
    const int digit = read_digit(pass, first + warp * kWarpEntries + i, end, &position);
    if (digit >= 0) atomicAdd(&counts[warp][digit], 1);
  }
  __syncthreads();
}

// counters[digit * tiles + tile] = entries of the tile with that digit. A block owns a tile of 2048
// entries. Bound by reading the indices, in order in the first pass and by gathering in later ones.
__global__ void __launch_bounds__(kThreads) transpose_count_kernel(Pass pass, int* counters) {
  __shared__ int counts[kWarps][kMostDigits];
  count_digits(pass, static_cast<int64_t>(blockIdx.x) * kTile, end_of_entries(pass), counts);
  const int digit = threadIdx.x;
  if (digit >= pass.digits) return;
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += counts[w][digit];
  counters[digit * pass.tiles + blockIdx.x] = sum;
}

// Lanes whose digit equals this lane's, as a mask; lanes without a digit (-1) have each other.
__device__ unsigned find_peers(int digit) {
  unsigned peers = kFullMask;
#pragma unroll
  for (int bit = 0; bit <= kMostDigitBits; ++bit) {
    const bool set = (digit >> bit) & 1;
    const unsigned votes = __ballot_sync(kFullMask, set);
    peers &= set ? votes : ~votes;
  }
  return peers;
}

// sorted[starts of the digit + lanes before] = position. A block owns a tile, a warp 256
// consecutive entries of it; a warp's entries of a digit go behind those of the warps before it,
// and a lane's behind those of the lanes before it, so the sort is stable. Bound by the scattered
// stores: runs of kTile / digits neighbours.
__global__ void __launch_bounds__(kThreads)
    transpose_move_kernel(Pass pass, const int* counters, int32_t* sorted) {
  __shared__ int places[kWarps][kMostDigits];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = end_of_entries(pass);
  count_digits(pass, first, end, places);
  int start = 0;
  if (static_cast<int>(threadIdx.x) < pass.digits) {
    start = counters[threadIdx.x * pass.tiles + blockIdx.x];
  }
  for (int w = 0; w < kWarps; ++w) {
    const int here = places[w][threadIdx.x];
    places[w][threadIdx.x] = start;
    start += here;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  int* place = places[threadIdx.x / kWarp];
  const int64_t own = first + threadIdx.x / kWarp * kWarpEntries;
  for (int i = 0; i < kWarpEntries && own + i < end; i += kWarp) {
    int position = 0;
    const int digit = read_digit(pass, own + i + lane, end, &position);
    const unsigned peers = find_peers(digit);
    const int before = __popc(peers & ((1u << lane) - 1));
    if (digit >= 0) sorted[place[digit] + before] = position;
    __syncwarp();
    if (digit >= 0 && before == 0) place[digit] += __popc(peers);
    __syncwarp();
  }
}

// offsets[i] = how many listed entries have a latent below i: a thread per latent, by bisection.
// Bound by the latency of about log2(count) pairs of reads from the L2 cache.
__global__ void __launch_bounds__(kThreads)
    transpose_offsets_kernel(Indices indices, const int32_t* positions, const int* listed,
                             int64_t* offsets) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i > indices.n) return;
  int64_t low = 0;
  int64_t high = *listed;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (indices.at(positions[middle]) < i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offsets[i] = low;
}

}  // namespace

// Workspace: the positions between two passes, the counters with their scan's scratch.
int64_t transpose_codes_workspace(const TransposeCodesArguments& call) {
  const int64_t count = call.indices.count;
  const int64_t counters = count_tiles(count) << choose_digits(call.n).bits;
  return (count + counters + scan_scratch(counters)) * static_cast<int64_t>(sizeof(int));
}

void transpose_codes(const TransposeCodesArguments& call, void* workspace, cudaStream_t stream) {
  const int64_t count = call.indices.count, n = call.n;
  const Indices indices = make_indices("transpose_codes", call.indices.data, call.indices.type, n);
  if (count == 0 || n == 0) {
    check(cudaMemsetAsync(call.offsets, 0, static_cast<size_t>(n + 1) * sizeof(int64_t), stream),
          "transpose_codes: cudaMemsetAsync");
    return;
  }
  const Digits digits = choose_digits(n);
  const int64_t tiles = count_tiles(count);
  const int64_t size = tiles << digits.bits;
  int32_t* other = static_cast<int32_t*>(workspace);
  int* counters = other + count;
  int* scratch = counters + size;
  const int* listed = scan_total(scratch);
  const int32_t* order = nullptr;
  for (int number = 0; number < digits.passes; ++number) {
    const int* known = number == 0 ? nullptr : listed;
    const Pass pass{indices, order, known, count, number * digits.bits, 1 << digits.bits, tiles};
    int32_t* sorted = (digits.passes - number) % 2 == 1 ? call.positions : other;
    launch(transpose_count_kernel, static_cast<unsigned>(tiles), kThreads, 0, stream, pass,
           counters);
    exclusive_scan(counters, size, scratch, stream);
    launch(transpose_move_kernel, static_cast<unsigned>(tiles), kThreads, 0, stream, pass, counters,
           sorted);
    order = sorted;
  }
  launch(transpose_offsets_kernel, static_cast<unsigned>(n / kThreads + 1), kThreads, 0, stream,
         indices, call.positions, listed, call.offsets);
}

}  // namespace sparsekern::cuda
