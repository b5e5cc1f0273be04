// Which way of selecting a shape takes.
#include "cuda/topk/regimes.h"

namespace sparsekern::cuda {

Regime regime_for(int64_t rows, int64_t n, int64_t k) {
  const bool groups = k <= kWarpK && n >= kLeastWarpRow && n >= 8 * kLeastWarpGroups * k;
  if (n <= kShortRow) return groups ? Regime::kWarpCandidates : Regime::kShort;
  if (k <= kWarpK && n <= kWarpRow && rows >= kWarpRows) return Regime::kWarpCandidates;
  if (k <= kCandidateK) return Regime::kCandidates;
  if (n <= kSharedRow && k <= kSharedSort) return Regime::kShared;
  return Regime::kDigits;
}

Slices slices_for(int64_t rows, int64_t n) {
  if (rows >= kFillingRows || n < 2 * kLeastSlice)
    return {1, (n + kSliceStep - 1) / kSliceStep * kSliceStep};
  const int64_t wanted = (kFillingSlices + rows - 1) / rows;
  const int64_t even = (n + wanted - 1) / wanted;
  const int64_t least = even < kLeastSlice ? kLeastSlice : even;
  const int64_t width = (least + kSliceStep - 1) / kSliceStep * kSliceStep;
  return {(n + width - 1) / width, width};
}

int64_t topk_workspace(const TopkArguments& call) {
  if (call.smallest) return smallest_workspace(call);
  const int64_t rows = call.x.rows, n = call.x.columns;
  switch (regime_for(rows, n, call.k)) {
    case Regime::kCandidates:
      return candidates_workspace(rows, rows == 0 ? 1 : slices_for(rows, n).count, call.k);
    case Regime::kDigits:
      return sort_workspace(rows, call.k);
    default:
      return 0;
  }
}

void topk(const TopkArguments& arguments, void* workspace, cudaStream_t stream) {
  const int64_t rows = arguments.x.rows, n = arguments.x.columns;
  if (rows == 0) return;
  const TopkCall call{arguments, workspace, stream};
  if (call.smallest) return topk_smallest(call);
  switch (regime_for(rows, n, call.k)) {
    case Regime::kShort:
      return topk_short(call);
    case Regime::kShared:
      return topk_shared(call);
    case Regime::kWarpCandidates:
      return topk_candidates_of_warps(call);
    case Regime::kCandidates:
      return topk_candidates(call, slices_for(rows, n));
    case Regime::kDigits:
      return topk_digits(call);
  }
}

}  // namespace sparsekern::cuda
