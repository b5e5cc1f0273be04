// The k largest scores of a few float32 rows: their products with a row-major weight, which is read
// once, into scratch memory that stays in the caches, and the selection of topk.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// An element of the weight, for reading it, and one of its products.
constexpr double kNanosecondsPerWeight = 0.07;
constexpr double kNanosecondsPerProduct = 0.02;
// Dot products that are summed side by side: each has a register, and one vector or more their
// sums.
constexpr int kTile = kFloatLanes < 8 ? 8 : kFloatLanes;
constexpr int kTileRows = kTile < 16 ? 2 : 4;
// Latents that a thread takes at a time: they are neighbours of one tile for a single row.
constexpr int64_t kBlock = 16;
// Rows of the weight that are read at a time. Those of a width that is a power of two share their
// places in a cache.
constexpr int kStreams = 4;

struct Scoring {
  const float* x;  // [rows, d]
  int64_t rows, d, x_stride;
  const float* weight;  // [n, d]
  int64_t n, weight_stride;
  const float* bias;   // null or [n]
  const float* scale;  // null or [n]
  float* scores;       // [rows, n]
};

// Lanes of a and b, one after the other: those of every second group of kHalf, from the first or
// (kFirst = kHalf) from the second on.
template <int kFirst, int kHalf, int... kLane>
inline FloatLanes every_second(FloatLanes a, FloatLanes b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kLane / kHalf * 2 * kHalf + kLane % kHalf)...);
#else
  return __builtin_shuffle(a, b, IntLanes{(kFirst + kLane / kHalf * 2 * kHalf + kLane % kHalf)...});
#endif
}

// The sums of kFloatLanes vectors, in lanes; each is that of sum_lanes. x is used up.
template <int kHalf = kFloatLanes / 2>
inline FloatLanes sums_of(FloatLanes* x) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    constexpr auto kSequence = std::make_integer_sequence<int, kFloatLanes>{};
    for (int i = 0; i < kHalf; ++i) {
      x[i] = every_second<0, kHalf>(x[2 * i], x[2 * i + 1], kSequence) +
             every_second<kHalf, kHalf>(x[2 * i], x[2 * i + 1], kSequence);
    }
    return sums_of<kHalf / 2>(x);
  }
}

// dots[b * stride + i] = the products, vector by vector, of kRows rows with kLatents neighbours.
template <int kRows, int kLatents, int kStride, bool kFetch>
inline void multiply(const Scoring& p, const float* x, const float* weight, FloatLanes* dots) {
  const float* next = weight + kStreams * p.weight_stride;  // what is read after this
  FloatLanes dot[kRows][kLatents] = {};
  const auto step = [&](int64_t f, const auto& load_lanes) {
    FloatLanes w[kLatents];
    for (int i = 0; i < kLatents; ++i) {
      w[i] = load_lanes(weight + i * p.weight_stride + f);
      if (kFetch) __builtin_prefetch(next + i * p.weight_stride + f);
    }
    for (int b = 0; b < kRows; ++b) {
      const FloatLanes number = load_lanes(x + b * p.x_stride + f);
      for (int i = 0; i < kLatents; ++i) dot[b][i] = multiply_add(w[i], number, dot[b][i]);
    }
  };
  int64_t f = 0;
  for (; f + kFloatLanes <= p.d; f += kFloatLanes) step(f, [](auto* y) { return load(y); });
  if (const int64_t left = p.d - f; left > 0) {
    step(f, [left](auto* y) { return load_partial(y, left); });
  }
  for (int b = 0; b < kRows; ++b) {
    for (int i = 0; i < kLatents; ++i) dots[b * kStride + i] = dot[b][i];
  }
}

// scores[b, i] for kRows rows from `row` on and kLatents latents from `latent` on. Each dot product
// is added in ascending vectors, then by sum_lanes: as those of sparse_matmul_backward are.
template <int kRows, int kLatents, bool kFetch>
inline void score_tile(const Scoring& p, int64_t row, int64_t latent) {
  constexpr int kDots = (kRows * kLatents + kFloatLanes - 1) / kFloatLanes * kFloatLanes;
  constexpr int kAtOnce = kLatents < kStreams ? kLatents : kStreams;
  FloatLanes dots[kDots] = {};  // those beyond the last stay zero
  for (int i = 0; i < kLatents; i += kAtOnce) {
    multiply<kRows, kAtOnce, kLatents, kFetch>(p, p.x + row * p.x_stride,
                                               p.weight + (latent + i) * p.weight_stride, dots + i);
  }
  float sums[kDots];
  for (int i = 0; i < kDots; i += kFloatLanes) store(sums + i, sums_of(dots + i));
  for (int b = 0; b < kRows; ++b) {
    std::memcpy(p.scores + (row + b) * p.n + latent, sums + b * kLatents, kLatents * sizeof(float));
  }
}

// The dot products of kRows rows with latents [begin, end).
template <int kRows, bool kFetch>
inline void score_rows(const Scoring& p, int64_t row, int64_t begin, int64_t end) {
  constexpr int kLatents = kRows == 3 ? kTile / 4 : kTile / kRows;
  int64_t i = begin;
  for (; i + kLatents <= end; i += kLatents) score_tile<kRows, kLatents, kFetch>(p, row, i);
  for (; i < end; ++i) score_tile<kRows, 1, false>(p, row, i);
}

// Latents [begin, end) of every row.
void score_block(const Scoring& p, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + kTileRows <= p.rows; row += kTileRows) {
    if (row == 0) {
      score_rows<kTileRows, true>(p, row, begin, end);
    } else {
      score_rows<kTileRows, false>(p, row, begin, end);
    }
  }
  const int64_t left = p.rows - row;
  if (kTileRows > 3 && left == 3) score_rows<3, true>(p, row, begin, end);
  if (kTileRows > 2 && left == 2) score_rows<2, true>(p, row, begin, end);
  if (left == 1) score_rows<1, true>(p, row, begin, end);
}

// scores = (scores + bias) * scale for latents [begin, end).
void finish_scores(const Scoring& p, int64_t begin, int64_t end) {
  if (p.bias == nullptr && p.scale == nullptr) return;
  for (int64_t b = 0; b < p.rows; ++b) {
    float* scores = p.scores + b * p.n;
    if (p.bias != nullptr) {
      for (int64_t i = begin; i < end; ++i) scores[i] += p.bias[i];
    }
    if (p.scale != nullptr) {
      for (int64_t i = begin; i < end; ++i) scores[i] *= p.scale[i];
    }
  }
}

}  // namespace

void linear_topk(const LinearTopkArguments& call, int threads) {
  const Matrix &x = call.x, &weight = call.weight;
  if (x.dtype != kFloat32 || weight.dtype != kFloat32) {
    throw std::runtime_error("linear_topk: x and weight must be float32, got dtype numbers " +
                             std::to_string(static_cast<int>(x.dtype)) + " and " +
                             std::to_string(static_cast<int>(weight.dtype)));
  }
  const Buffer<float> scores(x.rows * weight.rows);
  const Scoring p{static_cast<const float*>(x.data),
                  x.rows,
                  x.columns,
                  x.row_stride,
                  static_cast<const float*>(weight.data),
                  weight.rows,
                  weight.row_stride,
                  call.bias,
                  call.scale,
                  scores.get()};
  const double weights = static_cast<double>(p.n * p.d);
  const double work =
      weights * (kNanosecondsPerWeight + kNanosecondsPerProduct * static_cast<double>(p.rows - 1));
  const int64_t blocks = (p.n + kBlock - 1) / kBlock;
  const int team = useful_threads(blocks < threads ? static_cast<int>(blocks) : threads, work);
  in_parallel(team, [&](int member) {
    const Share share = share_of(blocks, member, team);
    const int64_t last = std::min(share.end * kBlock, p.n);
    for (int64_t begin = share.begin * kBlock; begin < last; begin += kBlock) {
      score_block(p, begin, std::min(begin + kBlock, last));
    }
    finish_scores(p, share.begin * kBlock, last);
  });
  topk({{scores.get(), kFloat32, p.rows, p.n, p.n, 1},
        call.k,
        call.sorted,
        call.relu,
        false,
        call.values,
        call.indices,
        nullptr,
        nullptr,
        false},
       threads);
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
