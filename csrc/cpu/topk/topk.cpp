// The k largest of each row: each regime's way through a row, and rows or slices over threads.
#include <algorithm>
#include <type_traits>

#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/order/digits.h"
#include "cpu/topk/candidates.h"
#include "cpu/topk/first.h"
#include "cpu/topk/halving.h"
#include "cpu/topk/regimes.h"
#include "cpu/topk/row.h"
#include "cpu/topk/smallest.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// ---- selection: each writes the k selected indices of a row, in the order that is asked for ----

template <bool kAbsolute, class Stored>
inline void select_by_digits(const Row<Stored>& row) {
  using Key = decltype(key_at<kAbsolute>(row, 0));
  take_by_digits<Key>([&](int64_t i) { return key_at<kAbsolute>(row, i); }, row.n, row.k,
                      row.indices);
  order_row<kAbsolute>(row);
}

template <bool kAbsolute, class Stored>
inline void select_ranked(const Row<Stored>& row) {
  typename Row<Stored>::Key keys[kRankedRow];
  for (int64_t i = 0; i < row.n; ++i) keys[i] = key_at<kAbsolute>(row, i);
  pad(keys, row.n);
  if (row.sorted) {
    int64_t order[kRankedRow];
    rank_keys(keys, row.n, [&](int64_t i, int64_t rank) { order[rank] = i; });
    std::memcpy(row.indices, order, static_cast<size_t>(row.k) * sizeof(int64_t));
  } else {
    int64_t count = 0;
    rank_keys(keys, row.n, [&](int64_t i, int64_t rank) {
      if (rank < row.k) row.indices[count++] = i;
    });
  }
}

// A row of neighbours; `keys` has room for kHeldKeys, and for one vector more.
template <bool kAbsolute, class Stored>
inline void select_by_halving(const Row<Stored>& row, typename Row<Stored>::Key* keys) {
  Halving<kAbsolute, Stored> halving(row, keys);
  const auto bound = halving.find();
  if (!bound) return select_by_digits<kAbsolute>(row);
  halving.take(*bound, row.indices);
  order_row<kAbsolute>(row);
}

template <class Stored>
using CandidatesOf = Candidates<typename Sum<Stored>::Scalar>;

// Elements [begin, end) of a row into candidates; false when there is a NaN.
template <bool kAbsolute, class Stored>
inline bool read_part(CandidatesOf<Stored>& candidates, const Row<Stored>& row, int64_t begin,
                      int64_t end) {
  if (row.stride == 1) {
    for (int64_t i = begin; i < end; i += candidates.segment()) {
      const int64_t count = std::min(candidates.segment(), end - i);
      if (!candidates.template read<kAbsolute>(row.x + i, i, count, count)) return false;
    }
    return true;
  }
  typename Sum<Stored>::Scalar gathered[kStridedSegment<Stored>];
  for (int64_t i = begin; i < end; i += kStridedSegment<Stored>) {
    const int64_t count = std::min(kStridedSegment<Stored>, end - i);
    for (int64_t j = 0; j < count; ++j) gathered[j] = to_sum(row.x[(i + j) * row.stride]);
    if (!candidates.template read<kAbsolute>(gathered, i, count, 0)) return false;
  }
  return true;
}

// The candidates -> row.indices, in the order that is asked for.
template <bool kAbsolute, class Stored>
inline void take_candidates(CandidatesOf<Stored>& candidates, const Row<Stored>& row) {
  if (row.sorted && row.k <= kRankedByPairs) {
    return candidates.rank(row.indices);
  }
  candidates.tighten();
  for (int64_t j = 0; j < row.k; ++j) row.indices[j] = candidates.index(j);
  order_row<kAbsolute>(row);
}

template <bool kAbsolute, class Stored>
inline void select_row(Regime regime, CandidatesOf<Stored>& candidates, const Row<Stored>& row) {
  if (regime == Regime::kFirst) {
    row.indices[0] = first_of<kAbsolute>(row.x, row.n);
    return;
  }
  if (regime == Regime::kRanked) return select_ranked<kAbsolute>(row);
  if (regime == Regime::kCandidates) {
    candidates.clear();
    if (read_part<kAbsolute>(candidates, row, 0, row.n)) {
      return take_candidates<kAbsolute>(candidates, row);
    }
  }
  if (row.stride == 1) return select_by_halving<kAbsolute>(row, candidates.held_keys());
  select_by_digits<kAbsolute>(row);
}

// ---- threads ----

// A batch: rows over threads.
template <bool kAbsolute, class Stored, class RowAt>
void select_batch(const RowAt& row_at, int64_t rows, const Row<Stored>& shape, Regime regime,
                  double row_nanoseconds, int threads) {
  const int64_t row_bytes = shape.n * static_cast<int64_t>(sizeof(Stored));
  const int team = useful_threads(rows < threads ? static_cast<int>(rows) : threads,
                                  row_nanoseconds * static_cast<double>(rows));
  Queue queue(rows, rows_at_once(rows, row_bytes, team));
  in_parallel(team, [&](int) {
    CandidatesOf<Stored> candidates(contiguous<Stored>(shape.n, shape.stride),
                                    std::min(shape.k, kCandidateK<Stored>));
    for (Share share = queue.next(); share.begin < share.end; share = queue.next()) {
      for (int64_t b = share.begin; b < share.end; ++b) {
        const Row<Stored> row = row_at(b);
        select_row<kAbsolute>(regime, candidates, row);
        write_row(row);
      }
    }
  });
}

// Fewer rows than threads: the slices of one row over threads, then one merge in slice order.
template <bool kAbsolute, class Stored>
void select_sliced(const Row<Stored>& row, int64_t slices) {
  Buffer<typename Row<Stored>::Key> keys(slices * row.k);
  Buffer<uint32_t> indices(slices * row.k);
  Buffer<int64_t> counts(slices);
  const int64_t width = (row.n + slices - 1) / slices;
  in_parallel(static_cast<int>(slices), [&](int s) {
    CandidatesOf<Stored> candidates(contiguous<Stored>(width, row.stride), row.k);
    const bool whole =
        read_part<kAbsolute>(candidates, row, s * width, std::min(row.n, (s + 1) * width));
    candidates.tighten();
    counts.get()[s] = whole ? candidates.count() : -1;
    for (int64_t j = 0; j < candidates.count(); ++j) {
      keys.get()[s * row.k + j] = candidates.key(j);
      indices.get()[s * row.k + j] = candidates.index(j);
    }
  });
  CandidatesOf<Stored> merged(width, row.k);
  for (int64_t s = 0; s < slices; ++s) {
    if (counts.get()[s] < 0) {
      return select_row<kAbsolute>(Regime::kHalving, merged, row);
    }
    for (int64_t j = s * row.k; j < s * row.k + counts.get()[s]; ++j) {
      merged.add(keys.get()[j], indices.get()[j]);
    }
  }
  take_candidates<kAbsolute>(merged, row);
}

template <bool kAbsolute, class Stored, class RowAt>
void select_all(const RowAt& row_at, int64_t rows, const Row<Stored>& shape, int threads) {
  const Regime regime = regime_for<Stored>(shape.n, shape.stride, shape.k);
  const double nanoseconds = nanoseconds_of_row(regime, shape.n, shape.stride, shape.k);
  const int64_t slices = slices_for(regime, rows, shape.n, nanoseconds, threads);
  if (slices == 1) {
    return select_batch<kAbsolute>(row_at, rows, shape, regime, nanoseconds, threads);
  }
  for (int64_t b = 0; b < rows; ++b) {
    const Row<Stored> row = row_at(b);
    select_sliced<kAbsolute>(row, slices);
    write_row(row);
  }
}

}  // namespace

void topk(const TopkArguments& call, int threads) {
  const KeepDenormals mode;
  if (call.smallest) return topk_smallest(call, threads);
  const int64_t rows = call.x.rows, n = call.x.columns, k = call.k;
  visit_dtype("topk", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const int64_t dense_bytes = rows * n * static_cast<int64_t>(sizeof(Stored));
    if (call.masked != nullptr) advise_huge_pages(call.masked, static_cast<size_t>(dense_bytes));
    Row<Stored> shape{};
    shape.n = n;
    shape.stride = call.x.column_stride;
    shape.k = k;
    shape.sorted = call.sorted;
    shape.relu = call.relu;
    shape.counts = call.counts;
    shape.past_caches = dense_bytes >= kLargerThanCaches;
    const auto row_at = [&](int64_t b) {
      Row<Stored> row = shape;
      row.x = static_cast<const Stored*>(call.x.data) + b * call.x.row_stride;
      row.values = static_cast<Stored*>(call.values) + b * k;
      row.indices = call.indices + b * k;
      row.masked = call.masked == nullptr ? nullptr : static_cast<Stored*>(call.masked) + b * n;
      return row;
    };
    if (call.abs) {
      select_all<true>(row_at, rows, shape, threads);
    } else {
      select_all<false>(row_at, rows, shape, threads);
    }
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
