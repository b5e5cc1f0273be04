// Forward: sparse codes times a row-major dictionary. Column-major: columns.h.

#include <algorithm>
#include <type_traits>

#include "cpu/common/dtypes.h"
#include "cpu/common/indices.h"
#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"
#include "cpu/sparse_matmul/columns.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// Features whose sums stay in the L1 cache (4 KiB of float32) while the dictionary streams past.
constexpr int64_t kTile = 1024;
// Dictionary rows read at once. Eight independent streams keep enough cache misses in flight that
// software prefetching gained nothing on top; sixteen were slower.
constexpr int kRowsAtOnce = 8;
constexpr double kNanosecondsPerMultiplyAdd = 0.1;
// Rows handed out at once, at most: enough to make the handing out cheap.
constexpr int64_t kRowsAtMost = 8;

// sums[0..width) += the next `Count` entries of the row, in their order.
template <int Count, class Values, class Weight, class Index, class Scalar>
inline void add_entries(const Product<Values, Weight, Index>& p, int64_t entry, int64_t feature,
                        int64_t width, Scalar* sums) {
  constexpr int kLanes = Sum<Values>::kLanes;
  typename Sum<Values>::Lanes scale[Count];
  const Weight* row[Count];
  for (int j = 0; j < Count; ++j) {
    scale[j] = broadcast(to_sum(p.values[entry + j]));
    row[j] = p.weight + static_cast<int64_t>(p.indices[entry + j]) * p.stride_n + feature;
  }
  int64_t f = 0;
  for (; f + kLanes <= width; f += kLanes) {
    auto sum = load(sums + f);
    for (int j = 0; j < Count; ++j) sum = multiply_add(scale[j], load(row[j] + f), sum);
    store(sums + f, sum);
  }
  if (f == width) return;
  auto sum = load(sums + f);
  for (int j = 0; j < Count; ++j) {
    sum = multiply_add(scale[j], load_partial(row[j] + f, width - f), sum);
  }
  store(sums + f, sum);
}

// out[b, feature : feature + width] for one row b. A thread owns whole rows; it walks the row's
// entries eight at a time, streaming eight dictionary rows into sums held in the L1 cache. Bound by
// the latency and bandwidth of gathering k * d weights from the last cache level and memory.
template <class Values, class Weight, class Index>
void multiply_row(const Product<Values, Weight, Index>& p, int64_t b, int64_t feature,
                  int64_t width) {
  constexpr int kLanes = Sum<Values>::kLanes;
  alignas(kCacheLineBytes) typename Sum<Values>::Scalar sums[kTile];
  for (int64_t f = 0; f < width; f += kLanes) {
    const int64_t left = width - f;
    if (p.bias == nullptr) {
      store(sums + f, typename Sum<Values>::Lanes{});
    } else if (left >= kLanes) {
      store(sums + f, load(p.bias + feature + f));
    } else {
      store(sums + f, load_partial(p.bias + feature + f, left));
    }
  }
  int64_t entry = b * p.k;
  const int64_t end = entry + p.k;
  for (; entry + kRowsAtOnce <= end; entry += kRowsAtOnce) {
    add_entries<kRowsAtOnce>(p, entry, feature, width, sums);
  }
  if ((end - entry) & 4) {
    add_entries<4>(p, entry, feature, width, sums);
    entry += 4;
  }
  if ((end - entry) & 2) {
    add_entries<2>(p, entry, feature, width, sums);
    entry += 2;
  }
  if ((end - entry) & 1) add_entries<1>(p, entry, feature, width, sums);
  Values* out = p.out + b * p.d + feature;
  for (int64_t f = 0; f < width; f += kLanes) {
    if (width - f >= kLanes) {
      store(out + f, load(sums + f));
    } else {
      store_partial(out + f, load(sums + f), width - f);
    }
  }
}

// Returns the position of the first index outside the dictionary, or -1. Rows are handed out a few
// at a time, since the threads do not start at the same moment.
template <class Values, class Weight, class Index>
int64_t multiply_rows(const Product<Values, Weight, Index>& p, int threads) {
  const double work = static_cast<double>(p.rows * (p.k + 1)) * static_cast<double>(p.d);
  const int team = useful_threads(threads, kNanosecondsPerMultiplyAdd * work);
  const int64_t chunk = std::clamp<int64_t>(p.rows / (4 * team), 1, kRowsAtMost);
  int64_t first_bad = p.rows * p.k;
  deal_out(team, p.rows, chunk, [&](int64_t b, int) {
    const int64_t end = (b + 1) * p.k;
    const int64_t bad = first_bad_in_block(p.indices, b * p.k, end, p.n);
    if (bad < end) return lower(&first_bad, bad);
    for (int64_t feature = 0; feature < p.d; feature += kTile) {
      const int64_t left = p.d - feature;
      multiply_row(p, b, feature, left < kTile ? left : kTile);
    }
  });
  return first_bad < p.rows * p.k ? first_bad : -1;
}

}  // namespace

int64_t sparse_matmul(const SparseMatmulArguments& call, int threads) {
  const Codes& codes = call.codes;
  const Matrix& matrix = call.weight;
  int64_t bad = -1;
  visit_indices("sparse_matmul", codes.indices, codes.index_type, [&](auto* indices) {
    using Index = std::remove_const_t<std::remove_pointer_t<decltype(indices)>>;
    visit_dtypes("sparse_matmul", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
      using Values = decltype(value);
      using Weight = decltype(weight);
      advise_huge_pages(call.out,
                        static_cast<size_t>(codes.rows * matrix.columns) * sizeof(Values));
      const Product<Values, Weight, Index> product{static_cast<const Values*>(codes.values),
                                                   indices,
                                                   codes.rows,
                                                   codes.k,
                                                   static_cast<const Weight*>(matrix.data),
                                                   matrix.rows,
                                                   matrix.columns,
                                                   matrix.row_stride,
                                                   matrix.column_stride,
                                                   static_cast<const Weight*>(call.bias),
                                                   static_cast<Values*>(call.out)};
      if (product.stride_d == 1 || product.d == 1) {
        bad = multiply_rows(product, threads);
        return;
      }
      bad = first_bad_index(indices, codes.count(), product.n, threads);
      if (bad < 0 && product.rows > 0 && product.d > 0) multiply_columns(product, threads);
    });
  });
  return bad;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
