// Codes -> dense rows, in one pass over the dense rows.
#include "cuda/common/dtypes.cuh"
#include "cuda/common/teams.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

// Columns that a block zeroes, and so many times k that reading all codes of the row is less than
// an eighth of the bytes it writes.
constexpr int64_t kTileColumns = 16384;
constexpr int64_t kColumnsPerCode = 64;

// A block owns `width` columns of a row: it writes zeros, 16 bytes at a time where they are
// aligned, then the values of the row's codes that fall on its columns. Bound by writing the dense
// rows once; the values hit lines that are still in the L2 cache.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    codes_to_dense_kernel(const T* values, const int64_t* indices, int64_t k, int64_t n,
                          int64_t tiles, int64_t width, T* dense) {
  const int64_t b = blockIdx.x / tiles;
  const int64_t begin = blockIdx.x % tiles * width;
  const int64_t end = begin + width < n ? begin + width : n;
  T* row = dense + b * n;
  write_zeros<BlockTeam>(row + begin, end - begin);
  __syncthreads();
  for (int64_t j = b * k + threadIdx.x; j < (b + 1) * k; j += kBlockThreads) {
    const int64_t index = indices[j];
    if (index >= begin && index < end) row[index] = values[j];
  }
}

}  // namespace

void codes_to_dense(const CodesToDenseArguments& call, cudaStream_t stream) {
  const int64_t rows = call.codes.rows, k = call.codes.k, n = call.n;
  if (rows == 0 || n == 0) return;
  const int64_t width = k * kColumnsPerCode > kTileColumns ? k * kColumnsPerCode : kTileColumns;
  const int64_t tiles = (n + width - 1) / width;
  const auto* indices = static_cast<const int64_t*>(call.codes.indices);
  visit_dtype("codes_to_dense", call.codes.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(codes_to_dense_kernel<T>, grid_of(rows * tiles), kBlockThreads, 0, stream,
           static_cast<const T*>(call.codes.values), indices, k, n, tiles, width,
           static_cast<T*>(call.dense));
  });
}

}  // namespace sparsekern::cuda
