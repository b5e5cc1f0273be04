// The k smallest of each row: the k largest of a copy whose elements have the order reversed.
//
// -x reverses the order of all numbers, +0 and -0 alike. A row with a NaN, which comes last then,
// takes the next number above -x instead, which leaves -inf free for NaN; NaN itself stands for
// -inf, which comes first.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/topk/regimes.h"
#include "cpu/topk/row.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Rows copied at a time by a thread: half of a second-level cache.
constexpr int64_t kReversedBytes = 256 << 10;

// The bits of a stored number as a signed integer, and those of +inf.
template <class Stored>
struct SignedBits;
template <>
struct SignedBits<float> {
  using type = int32_t;
  static constexpr type kInfinity = 0x7f800000;
};
template <>
struct SignedBits<BFloat16> {
  using type = int16_t;
  static constexpr type kInfinity = 0x7f80;
};
template <>
struct SignedBits<Float16> {
  using type = int16_t;
  static constexpr type kInfinity = 0x7c00;
};
template <>
struct SignedBits<double> {
  using type = int64_t;
  static constexpr type kInfinity = 0x7ff0000000000000;
};

// reversed[i] = -x[i * stride], or -|x[i * stride]|; true when there is a NaN.
template <bool kAbsolute, class Stored>
inline bool negate_row(const Stored* x, int64_t n, int64_t stride, Stored* reversed) {
  using Bits = typename SignedBits<Stored>::type;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  constexpr Bits kSign = std::numeric_limits<Bits>::min();
  Bits nan = 0;
  const auto negate = [&](int64_t i, int64_t place) {
    const Bits bits = bit_cast<Bits>(x[place]);
    const Bits magnitude = bits & kMagnitude;
    nan |= static_cast<Bits>(magnitude > SignedBits<Stored>::kInfinity);
    reversed[i] = bit_cast<Stored>(static_cast<Bits>((kAbsolute ? magnitude : bits) ^ kSign));
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) negate(i, i);
  } else {
    for (int64_t i = 0; i < n; ++i) negate(i, i * stride);
  }
  return nan != 0;
}

// Each number -> the next one above it; +inf -> NaN, NaN -> -inf.
template <class Stored>
inline void raise_row(Stored* row, int64_t n) {
  using Bits = typename SignedBits<Stored>::type;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  constexpr Bits kSign = std::numeric_limits<Bits>::min();
  constexpr Bits kInfinity = SignedBits<Stored>::kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits = bit_cast<Bits>(row[i]);
    const bool nan = (bits & kMagnitude) > kInfinity;
    bits = bits == kSign ? Bits{0} : bits;                            // -0 as +0
    const Bits next = static_cast<Bits>(bits + (bits < 0 ? -1 : 1));  // +inf + 1 is a NaN
    row[i] = bit_cast<Stored>(nan ? static_cast<Bits>(kInfinity | kSign) : next);
  }
}

// Codes of rows [begin, end) of call.x by way of `reversed`, which holds as many rows.
template <class Stored>
inline void select_smallest(const TopkArguments& call, int64_t begin, int64_t end, Stored* reversed,
                            int threads) {
  const int64_t n = call.x.columns, k = call.k, stride = call.x.column_stride;
  const auto row_of = [&](int64_t b) {
    return static_cast<const Stored*>(call.x.data) + b * call.x.row_stride;
  };
  for (int64_t b = begin; b < end; ++b) {
    Stored* row = reversed + (b - begin) * n;
    const bool nan = call.abs ? negate_row<true>(row_of(b), n, stride, row)
                              : negate_row<false>(row_of(b), n, stride, row);
    if (nan) raise_row(row, n);
  }
  Stored* values = static_cast<Stored*>(call.values) + begin * k;
  int64_t* indices = call.indices + begin * k;
  const Matrix largest{reversed, call.x.dtype, end - begin, n, n, 1};
  topk({largest, k, call.sorted, false, false, values, indices, nullptr, nullptr, false}, threads);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = (b - begin) * k;
    write_row(Row<Stored>{row_of(b), n, stride, k, call.sorted, call.relu, values + first,
                          indices + first, nullptr, call.counts, false});
  }
}

// Rows over threads; few long ones one after the other, each over the threads.
inline void topk_smallest(const TopkArguments& call, int threads) {
  visit_dtype("topk", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const int64_t rows = call.x.rows, n = call.x.columns;
    const int64_t row_bytes = n * static_cast<int64_t>(sizeof(Stored));
    const double nanoseconds =
        nanoseconds_of_row(regime_for<Stored>(n, 1, call.k), n, call.x.column_stride, call.k);
    const int team =
        useful_threads(rows < threads ? 1 : threads, nanoseconds * static_cast<double>(rows));
    const int64_t at_once =
        std::max<int64_t>(1, std::min(kReversedBytes / row_bytes, (rows + team - 1) / team));
    Queue queue(rows, at_once);
    in_parallel(team, [&](int) {
      const Buffer<Stored> reversed(at_once * n);
      for (Share share = queue.next(); share.begin < share.end; share = queue.next()) {
        select_smallest(call, share.begin, share.end, reversed.get(), team == 1 ? threads : 1);
      }
    });
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
