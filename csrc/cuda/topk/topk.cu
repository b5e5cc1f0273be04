// Which way of selecting a shape takes.
#include "cuda/topk/regimes.h"

namespace sparsekern::cuda {

Regime regime_for(int64_t n, int64_t k) {
  if (n <= kShortRow) return Regime::kShort;
  if (k <= kStreamedK) return Regime::kStream;
  if (n <= kSharedRow && k <= kSharedSort) return Regime::kShared;
  return Regime::kDigits;
}

Slices slices_for(int64_t rows, int64_t n) {
  if (rows >= kFillingRows || n < 2 * kLeastSlice) return {1, (n + kChunk - 1) / kChunk * kChunk};
  const int64_t wanted = (kFillingSlices + rows - 1) / rows;
  const int64_t even = (n + wanted - 1) / wanted;
  const int64_t least = even < kLeastSlice ? kLeastSlice : even;
  const int64_t width = (least + kChunk - 1) / kChunk * kChunk;
  return {(n + width - 1) / width, width};
}

int64_t topk_workspace(int64_t rows, int64_t n, int64_t k, int) {
  switch (regime_for(n, k)) {
    case Regime::kStream:
      return stream_workspace(rows, rows == 0 ? 1 : slices_for(rows, n).count, k);
    case Regime::kDigits:
      return sort_workspace(rows, k);
    default:
      return 0;
  }
}

void topk(const void* x, int dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride,
          int64_t k, int flags, void* values, int64_t* indices, void* masked, int64_t* counts,
          void* workspace, cudaStream_t stream) {
  if (rows == 0) return;
  const TopkCall call{x,     dtype,  rows,    n,      row_stride, col_stride, k,
                      flags, values, indices, masked, counts,     workspace,  stream};
  switch (regime_for(n, k)) {
    case Regime::kShort:
      return topk_short(call);
    case Regime::kShared:
      return topk_shared(call);
    case Regime::kStream:
      return topk_stream(call, slices_for(rows, n));
    case Regime::kDigits:
      return topk_digits(call);
  }
}

}  // namespace sparsekern::cuda
