// Rows rounded to bfloat16, with bounds of their lengths and of what rounding took from them.
#include <cmath>

#include "cuda/common/warp.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Rounding {
  const float* x;
  int64_t rows, d, stride;  // from one row to the next, or of column-major x from column to column
  uint16_t* rounded;
  float* lengths;
  float* errors;
};

// The bits of x rounded to bfloat16, as those of a float: ties to even, numbers that become less
// than 2^-126 to zero. NaN stays.
__device__ inline unsigned rounded_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return bits | 0x10000u;  // a payload in the lower bits alone would become infinity
  const unsigned nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (nearest & 0x7f800000u) == 0u ? 0u : nearest;
}

// An upper bound of the length of d numbers whose squares were summed in float32, in any order.
// Relative error: d roundings of the sum, one of each square, one of the root; absolute error:
// squares below 2^-126 may be lost. A sum that is not a number bounds nothing.
__device__ inline float length_of(float sum_of_squares, int64_t d) {
  const double n = static_cast<double>(d);
  const double square = static_cast<double>(sum_of_squares) * (1 + (n + 4) * 0x1p-23);
  const double bound = sqrt(square + n * 0x1p-125) * (1 + 0x1p-22);
  return bound == bound ? static_cast<float>(bound) : __int_as_float(0x7f800000);
}

// The sums of squares of a row's numbers, and of what rounding takes from them.
struct Squares {
  float length = 0, error = 0;

  // Returns x rounded.
  __device__ uint16_t add(float x) {
    const unsigned bits = rounded_bits(x);
    const float lost = x - __int_as_float(static_cast<int>(bits));
    length = fmaf(x, x, length);
    error = fmaf(lost, lost, error);
    return static_cast<uint16_t>(bits >> 16);
  }
  __device__ void write(const Rounding& p, int64_t b) const {
    p.lengths[b] = length_of(length, p.d);
    p.errors[b] = length_of(error, p.d);
  }
};

// A warp takes a row of a row-major matrix. Bound by memory: six bytes an element.
__global__ void __launch_bounds__(kThreads) round_rows_kernel(Rounding p) {
  const int64_t b =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (b >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const float* x = p.x + b * p.stride;
  uint16_t* out = p.rounded + b * p.d;
  Squares own;
#pragma unroll 8
  for (int64_t f = lane; f < p.d; f += kWarp) out[f] = own.add(x[f]);
  const Squares all{warp_sum(own.length), warp_sum(own.error)};
  if (lane == 0) all.write(p, b);
}

// A thread takes a row of a column-major matrix, so that neighbours read neighbours.
__global__ void __launch_bounds__(kThreads) round_columns_kernel(Rounding p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.rows) return;
  Squares own;
#pragma unroll 8
  for (int64_t f = 0; f < p.d; ++f) p.rounded[f * p.rows + b] = own.add(p.x[f * p.stride + b]);
  own.write(p, b);
}

}  // namespace

void round_rows(const RoundRowsArguments& call, cudaStream_t stream) {
  const Matrix& x = call.x;
  const bool columns = x.column_stride != 1 && x.columns > 1;
  const Rounding p{static_cast<const float*>(x.data),
                   x.rows,
                   x.columns,
                   columns ? x.column_stride : x.row_stride,
                   static_cast<uint16_t*>(call.rounded),
                   call.lengths,
                   call.errors};
  const int64_t per_block = columns ? kThreads : kWarps;
  launch(columns ? round_columns_kernel : round_rows_kernel,
         grid_of((p.rows + per_block - 1) / per_block), kThreads, 0, stream, p);
}

}  // namespace sparsekern::cuda
