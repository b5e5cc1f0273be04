// Rows rounded to bfloat16, with bounds of their lengths and of what rounding took from them.
#include <cmath>

#include "cpu/common/dtypes.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

constexpr double kNanosecondsPerElement = 0.15;
// Rows of a column-major matrix that are rounded together: a cache line of floats.
constexpr int64_t kRowsTogether = 16;

// x rounded to bfloat16, as a float. What a product may treat as zero, numbers below 2^-126, is
// zero.
inline FloatLanes rounded(FloatLanes x) {
  const FloatBits bits = (FloatBits)x;
  const FloatBits not_a_number = (FloatBits)(x != x);
  const FloatBits nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const FloatBits tiny = (FloatBits)((nearest & 0x7f800000u) == 0u);
  return (FloatLanes)((not_a_number & bits) | (~not_a_number & ~tiny & nearest));
}

// An upper bound of the length of d numbers whose squares were summed in float32, in any order.
// Relative error: d roundings of the sum, one of each square, one of the root; absolute error:
// squares below 2^-126 may be lost. A sum that is not a number bounds nothing.
float length_of(float sum_of_squares, int64_t d) {
  const double n = static_cast<double>(d);
  const double bound =
      std::sqrt(static_cast<double>(sum_of_squares) * (1 + (n + 4) * 0x1p-23) + n * 0x1p-125) *
      (1 + 0x1p-22);
  return bound == bound ? static_cast<float>(bound) : INFINITY;
}

struct Rounding {
  const float* x;
  int64_t rows, d, stride;  // from one row to the next, or of column-major x from column to column
  BFloat16* rounded;
  float* lengths;
  float* errors;
};

void round_row(const Rounding& p, int64_t b) {
  const float* x = p.x + b * p.stride;
  BFloat16* out = p.rounded + b * p.d;
  FloatLanes length = {}, error = {};
  const auto step = [&](FloatLanes number) {
    const FloatLanes nearest = rounded(number), lost = number - nearest;
    length = multiply_add(number, number, length);
    error = multiply_add(lost, lost, error);
    return nearest;
  };
  int64_t f = 0;
  for (; f + kFloatLanes <= p.d; f += kFloatLanes) store(out + f, step(load(x + f)));
  if (const int64_t left = p.d - f; left > 0) {
    store_partial(out + f, step(load_partial(x + f, left)), left);
  }
  p.lengths[b] = length_of(sum_lanes(length), p.d);
  p.errors[b] = length_of(sum_lanes(error), p.d);
}

// Rows [begin, end), at most kRowsTogether, of a column-major matrix.
void round_columns(const Rounding& p, int64_t begin, int64_t end) {
  constexpr int kVectors = kRowsTogether / kFloatLanes;
  FloatLanes length[kVectors] = {}, error[kVectors] = {};
  const int64_t count = end - begin;
  for (int64_t f = 0; f < p.d; ++f) {
    const float* x = p.x + f * p.stride + begin;
    BFloat16* out = p.rounded + f * p.rows + begin;
    for (int v = 0; v < kVectors && v * kFloatLanes < count; ++v) {
      const int64_t at = v * kFloatLanes, left = count - at;
      const bool whole = left >= kFloatLanes;
      const FloatLanes number = whole ? load(x + at) : load_partial(x + at, left);
      const FloatLanes nearest = rounded(number), lost = number - nearest;
      length[v] = multiply_add(number, number, length[v]);
      error[v] = multiply_add(lost, lost, error[v]);
      if (whole) {
        store(out + at, nearest);
      } else {
        store_partial(out + at, nearest, left);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    p.lengths[begin + i] = length_of(length[i / kFloatLanes][i % kFloatLanes], p.d);
    p.errors[begin + i] = length_of(error[i / kFloatLanes][i % kFloatLanes], p.d);
  }
}

}  // namespace

void round_rows(const RoundRowsArguments& call, int threads) {
  const KeepDenormals mode;
  const Matrix& x = call.x;
  const bool columns = x.column_stride != 1 && x.columns > 1;
  const Rounding p{static_cast<const float*>(x.data),
                   x.rows,
                   x.columns,
                   columns ? x.column_stride : x.row_stride,
                   static_cast<BFloat16*>(call.rounded),
                   call.lengths,
                   call.errors};
  const double work = kNanosecondsPerElement * static_cast<double>(x.rows * x.columns);
  const int team = useful_threads(threads, work);
  if (!columns) {
    return deal_out(team, p.rows, kRowsTogether, [&](int64_t b, int) { round_row(p, b); });
  }
  const int64_t groups = (p.rows + kRowsTogether - 1) / kRowsTogether;
  share_out(team, groups, [&](int64_t group) {
    const int64_t begin = group * kRowsTogether;
    round_columns(p, begin, begin + kRowsTogether < p.rows ? begin + kRowsTogether : p.rows);
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
