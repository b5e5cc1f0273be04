// The regimes, one launcher each, and which of them a shape takes. docs/how-topk-works.md explains
// them.
#pragma once

#include "cuda/kernels.h"

namespace sparsekern::cuda {

struct TopkCall : TopkArguments {
  void* workspace;
  cudaStream_t stream;
};

constexpr int64_t kShortRow = 2048;    // a lane holds up to 64 elements in registers
constexpr int64_t kSharedRow = 32768;  // 128 KiB of keys; sm_80 has 163 KiB for a block
constexpr int64_t kSharedSort = 4096;  // codes that a block sorts in shared memory, 32 KiB
constexpr int64_t kCandidateK = 512;   // the largest k of the candidates

// Shorter rows of the candidates take a warp each where there are 16 of them for each of an H200's
// 132 multiprocessors: no barriers, and nothing is done eight times over.
constexpr int64_t kWarpRow = 16384;
constexpr int64_t kWarpK = 128;
constexpr int64_t kWarpRows = 2112;
// Rows that a warp could hold in registers take that way, too, where there are four groups of 8
// elements for each wanted one.
constexpr int64_t kLeastWarpRow = 512;
constexpr int64_t kLeastWarpGroups = 4;

// Rows from which a block per row fills the GPU: two blocks for each of an H200's 132
// multiprocessors. With fewer rows the blocks are slices, four for each multiprocessor.
constexpr int64_t kFillingRows = 264;
constexpr int64_t kFillingSlices = 528;
constexpr int64_t kLeastSlice = 8192;
constexpr int64_t kSliceStep = 4096;  // slices begin at multiples of this

// n <= kShortRow. A warp per row.
void topk_short(const TopkCall& call);

// n <= kSharedRow, k <= kSharedSort. The row's keys in shared memory.
void topk_shared(const TopkCall& call);

// k <= kWarpK. One pass over each row, a warp per row.
void topk_candidates_of_warps(const TopkCall& call);

// k <= kCandidateK. One pass over each row, a block for each of the `slices` of `width` elements (a
// multiple of kSliceStep) into which it is cut; with more than one slice the workspace holds
// candidates_workspace(rows, slices, k) bytes.
struct Slices {
  int64_t count, width;
};
Slices slices_for(int64_t rows, int64_t n);
int64_t candidates_workspace(int64_t rows, int64_t slices, int64_t k);
void topk_candidates(const TopkCall& call, const Slices& slices);

// Any n and k. Counts digits, reading the row five times (16-bit numbers: four). With `sorted` and
// k > kSharedSort the workspace holds sort_workspace(rows, k) bytes.
void topk_digits(const TopkCall& call);
int64_t sort_workspace(int64_t rows, int64_t k);

// k <= kCandidateK. The first k of rows that come in parts, a warp (k <= kWarpK) or a block per
// row.
void topk_update_of_warps(const TopkUpdateArguments& call, cudaStream_t stream);
void topk_update_of_blocks(const TopkUpdateArguments& call, cudaStream_t stream);

// Sorts the pairs (key, index) in the place of call.indices and writes the codes.
void write_sorted(const TopkCall& call);

// The k smallest: one of the above on a copy of x, which the workspace of smallest_workspace(call)
// bytes holds beside that of the largest.
void topk_smallest(const TopkCall& call);
int64_t smallest_workspace(const TopkArguments& call);

enum class Regime { kShort, kShared, kWarpCandidates, kCandidates, kDigits };
Regime regime_for(int64_t rows, int64_t n, int64_t k);

}  // namespace sparsekern::cuda
