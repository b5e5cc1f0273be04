#include "cpu/topk/topk.h"

#include <algorithm>
#include <type_traits>

#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/order/digits.h"
#include "cpu/topk/candidates.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// Up to this k the sort's second buffer lies on the stack; beyond, it is sorted in place.
constexpr int64_t kSortedByBytes = 1024;
// One thread takes at least this much of a batch at a time, and of a single row.
constexpr int64_t kGrainBytes = 64 << 10;
// One element read as a stream, gathered with a stride, or taken apart in digits; one selected.
constexpr double kNanosecondsStreamed = 0.06, kNanosecondsStrided = 1, kNanosecondsByDigits = 4;
constexpr double kNanosecondsPerSelected = 6;
constexpr double kNanosecondsPerClearedByte = 0.05;
constexpr int64_t kSliceElements = 64 << 10;
constexpr int64_t kLargerThanCaches = 16 << 20;
constexpr int64_t kChunksPerThread = 8;  // enough to even out a slow thread
constexpr int64_t kStridedSegment = 4096;

// One row of x, and where its results go.
template <class Stored>
struct Row {
  const Stored* x;
  int64_t n, stride, k;
  int flags;
  Stored* values;
  int64_t* indices;
  Stored* masked;
  int64_t* counts;
  bool past_caches;  // whether `masked` is written so
};

// ---- output ----

// Greater-first order of (key, index) pairs as one signed integer.
inline int64_t composite(int32_t key, int64_t index) {
  return static_cast<int64_t>(key) * (int64_t{1} << 32) + (0xffffffff - index);
}

struct Greater {
  bool operator()(int64_t a, int64_t b) const { return a > b; }
};

// pairs[0..k) -> order, largest first.
inline void rank_pairs(int64_t* pairs, int64_t k) {
  int64_t ordered[kRankedByPairs];
  for (int64_t i = 0; i < k; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < k; ++j) rank += pairs[j] > pairs[i];
    ordered[rank] = pairs[i];
  }
  std::memcpy(pairs, ordered, static_cast<size_t>(k) * sizeof(int64_t));
}

// The same for pairs in ascending index order: a stable counting sort over the bytes of the keys.
inline void sort_pairs_by_bytes(int64_t* pairs, int64_t k) {
  constexpr int64_t kSign = INT64_MIN;  // signed order to unsigned order
  int64_t other[kSortedByBytes];
  int64_t *from = pairs, *to = other;
  for (int shift = 32; shift < 64; shift += 8) {
    uint16_t starts[257] = {};
    const auto digit = [&](int64_t pair) {
      return 255 - ((static_cast<uint64_t>(pair ^ kSign) >> shift) & 255);
    };
    for (int64_t i = 0; i < k; ++i) ++starts[digit(from[i]) + 1];
    for (int d = 0; d < 256; ++d) starts[d + 1] += starts[d];
    for (int64_t i = 0; i < k; ++i) to[starts[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
}

inline void order_pairs(int64_t* pairs, int64_t k) {
  if (k <= kRankedByPairs) {
    rank_pairs(pairs, k);
  } else if (k <= kSortedByBytes) {
    sort_pairs_by_bytes(pairs, k);
  } else {
    std::sort(pairs, pairs + k, Greater{});
  }
}

template <bool kAbsolute, class Stored>
inline auto key_at(const Row<Stored>& row, int64_t i) {
  return key_of(ranked<kAbsolute>(to_sum(row.x[i * row.stride])));
}

// Ascending row.indices -> largest first, if that is asked for. 32-bit keys are sorted with their
// index in one integer.
template <bool kAbsolute, class Stored>
inline void order_row(const Row<Stored>& row) {
  if ((row.flags & kSorted) == 0) return;
  if constexpr (std::is_same_v<Stored, double>) {
    std::sort(row.indices, row.indices + row.k, [&](int64_t a, int64_t b) {
      const int64_t first = key_at<kAbsolute>(row, a), second = key_at<kAbsolute>(row, b);
      return first != second ? first > second : a < b;
    });
  } else {
    for (int64_t j = 0; j < row.k; ++j) {
      row.indices[j] = composite(key_at<kAbsolute>(row, row.indices[j]), row.indices[j]);
    }
    order_pairs(row.indices, row.k);
    for (int64_t j = 0; j < row.k; ++j) row.indices[j] = 0xffffffff - (row.indices[j] & 0xffffffff);
  }
}

// Zeros. Past the caches (on AVX-512) where the whole output is larger than they are: its lines
// are then not read first. Measured on 33 MB that are mapped already: 1.6 ms instead of 2.0.
inline void clear(void* start, int64_t bytes, bool past_caches) {
  char *at = static_cast<char*>(start), *end = at + bytes;
  if (past_caches) {
    const auto skipped = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(at) % kCacheLineBytes);
    const int64_t head = std::min(bytes, skipped);
    std::memset(at, 0, static_cast<size_t>(head));
    for (at += head; at + kLaneBytes <= end; at += kLaneBytes) {
      stream(reinterpret_cast<float*>(at), FloatLanes{});
    }
    finish_streams();
  }
  std::memset(at, 0, static_cast<size_t>(end - at));
}

// Selected indices, in their final order -> values, the masked row, counts.
template <class Stored>
inline void write_row(const Row<Stored>& row) {
  for (int64_t j = 0; j < row.k; ++j) row.values[j] = row.x[row.indices[j] * row.stride];
  if ((row.flags & kRelu) != 0) {
    for (int64_t j = 0; j < row.k; ++j) {
      if (to_sum(row.values[j]) <= 0) row.values[j] = Stored{};
    }
  }
  if (row.masked != nullptr) {
    clear(row.masked, row.n * static_cast<int64_t>(sizeof(Stored)), row.past_caches);
    for (int64_t j = 0; j < row.k; ++j) row.masked[row.indices[j]] = row.values[j];
  }
  if (row.counts != nullptr) {  // integer additions in any order give one result
    for (int64_t j = 0; j < row.k; ++j) {
      const int64_t fired = to_sum(row.values[j]) != 0;
      __atomic_fetch_add(row.counts + row.indices[j], fired, __ATOMIC_RELAXED);
    }
  }
}

// ---- selection: each writes the k selected indices of a row, ascending ----

template <bool kAbsolute, class Stored>
inline void select_exactly(const Row<Stored>& row) {
  using Key = decltype(key_at<kAbsolute>(row, 0));
  select_by_digits<Key>([&](int64_t i) { return key_at<kAbsolute>(row, i); }, row.n, row.k,
                        row.indices);
}

// n <= kShortRow, k too large for the candidates: all keys of the row at once, in the L1 cache.
template <bool kAbsolute, class Stored>
inline void select_short(const Row<Stored>& row, int32_t* keys) {
  for (int64_t i = 0; i < row.n; ++i) keys[i] = key_at<kAbsolute>(row, i);
  const int64_t padded = (row.n + kFloatLanes - 1) / kFloatLanes * kFloatLanes;
  for (int64_t i = row.n; i < padded; ++i) keys[i] = INT32_MIN;
  const Bound bound = bisect(keys, row.n, row.k, 0, range_of(keys, row.n));
  int64_t ties = row.k;
  if (bound.at_least > row.k)
    ties -= bound.key == INT32_MAX ? 0 : count_at_least(keys, row.n, bound.key + 1);
  const IntLanes limit = broadcast(bound.key);
  int64_t count = 0;
  for (int64_t i = 0; i < padded; i += kFloatLanes) {
    const IntLanes lanes = load_keys(keys + i);
    for (uint32_t bits = bits_of(lanes >= limit); bits != 0; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      if (keys[at] == bound.key && ties-- <= 0) continue;
      row.indices[count++] = at;
    }
  }
}

// How many elements of a row of n are read at a time: those with a stride are gathered first.
template <class Stored>
inline int64_t contiguous(const Row<Stored>& row, int64_t n) {
  return row.stride == 1 ? n : std::min(n, kStridedSegment);
}

// Elements [begin, end) of a row into candidates; false when there is a NaN.
template <bool kAbsolute, class Stored>
inline bool read_part(Candidates& candidates, const Row<Stored>& row, int64_t begin, int64_t end) {
  if (row.stride == 1) {
    for (int64_t i = begin; i < end; i += candidates.segment()) {
      const int64_t count = std::min(candidates.segment(), end - i);
      if (!candidates.read<kAbsolute>(row.x + i, i, count, count)) return false;
    }
    return true;
  }
  float gathered[kStridedSegment];
  for (int64_t i = begin; i < end; i += kStridedSegment) {
    const int64_t count = std::min(kStridedSegment, end - i);
    for (int64_t j = 0; j < count; ++j) gathered[j] = to_sum(row.x[(i + j) * row.stride]);
    if (!candidates.read<kAbsolute>(gathered, i, count, 0)) return false;
  }
  return true;
}

// The candidates -> row.indices, in the order that is asked for.
template <bool kAbsolute, class Stored>
inline void take_candidates(Candidates& candidates, const Row<Stored>& row) {
  if ((row.flags & kSorted) != 0 && row.k <= kRankedByPairs) {
    return candidates.rank(row.indices);
  }
  candidates.tighten();
  for (int64_t j = 0; j < row.k; ++j) row.indices[j] = candidates.index(j);
  order_row<kAbsolute>(row);
}

template <bool kAbsolute, class Stored>
inline void select_row(Candidates& candidates, const Row<Stored>& row) {
  if constexpr (!std::is_same_v<Stored, double>) {
    if (Candidates::suits(contiguous(row, row.n), row.k)) {
      candidates.clear();
      if (read_part<kAbsolute>(candidates, row, 0, row.n)) {
        return take_candidates<kAbsolute>(candidates, row);
      }
    } else if (row.n <= kShortRow) {
      select_short<kAbsolute>(row, candidates.short_row());
      return order_row<kAbsolute>(row);
    }
  }
  select_exactly<kAbsolute>(row);
  order_row<kAbsolute>(row);
}

// ---- launch ----

// How long a row takes one thread.
template <class Stored>
double nanoseconds_of(const Row<Stored>& row) {
  const bool streamed =
      !std::is_same_v<Stored, double> && Candidates::suits(contiguous(row, row.n), row.k);
  const double element = !streamed         ? kNanosecondsByDigits
                         : row.stride == 1 ? kNanosecondsStreamed
                                           : kNanosecondsStrided;
  const double cleared = row.masked == nullptr ? 0 : kNanosecondsPerClearedByte * sizeof(Stored);
  return (element + cleared) * static_cast<double>(row.n) +
         kNanosecondsPerSelected * static_cast<double>(row.k);
}

// A batch: rows over threads.
template <bool kAbsolute, class Stored, class RowAt>
void select_batch(const RowAt& row_at, int64_t rows, const Row<Stored>& shape, int threads) {
  const int64_t row_bytes = shape.n * static_cast<int64_t>(sizeof(Stored));
  const int64_t least = std::max<int64_t>(1, kGrainBytes / row_bytes);
  const int used = useful_threads(rows < threads ? static_cast<int>(rows) : threads,
                                  nanoseconds_of(shape) * static_cast<double>(rows));
  // neighbouring rows stay with a thread, so that what it fetches ahead is of use to it
  Queue queue(rows, std::max(std::min(least, rows / used), rows / (kChunksPerThread * used)));
  in_parallel(used, [&](int) {
    Candidates candidates(contiguous(shape, shape.n), std::min(shape.k, kStreamedK));
    for (Share share = queue.next(); share.begin < share.end; share = queue.next()) {
      for (int64_t b = share.begin; b < share.end; ++b) {
        const Row<Stored> row = row_at(b);
        select_row<kAbsolute>(candidates, row);
        write_row(row);
      }
    }
  });
}

// Fewer rows than threads: the slices of one row over threads, then one merge in slice order.
template <bool kAbsolute, class Stored>
void select_sliced(const Row<Stored>& row, int64_t slices) {
  Buffer<int32_t> keys(slices * row.k);
  Buffer<uint32_t> indices(slices * row.k);
  Buffer<int64_t> counts(slices);
  const int64_t width = (row.n + slices - 1) / slices;
  in_parallel(static_cast<int>(slices), [&](int s) {
    Candidates candidates(contiguous(row, width), row.k);
    const bool whole =
        read_part<kAbsolute>(candidates, row, s * width, std::min(row.n, (s + 1) * width));
    candidates.tighten();
    counts.get()[s] = whole ? candidates.count() : -1;
    for (int64_t j = 0; j < candidates.count(); ++j) {
      keys.get()[s * row.k + j] = candidates.key(j);
      indices.get()[s * row.k + j] = candidates.index(j);
    }
  });
  Candidates merged(width, row.k);
  for (int64_t s = 0; s < slices; ++s) {
    if (counts.get()[s] < 0) {
      select_exactly<kAbsolute>(row);
      return order_row<kAbsolute>(row);
    }
    for (int64_t j = s * row.k; j < s * row.k + counts.get()[s]; ++j) {
      merged.add(keys.get()[j], indices.get()[j]);
    }
  }
  take_candidates<kAbsolute>(merged, row);
}

template <bool kAbsolute, class Stored, class RowAt>
void select_all(const RowAt& row_at, int64_t rows, const Row<Stored>& shape, int threads) {
  const int64_t slices =
      std::min<int64_t>(useful_threads(threads, nanoseconds_of(shape)), shape.n / kSliceElements);
  const bool sliced =
      rows < threads && slices > 1 && Candidates::suits(contiguous(shape, shape.n), shape.k);
  if (std::is_same_v<Stored, double> || !sliced) {
    select_batch<kAbsolute>(row_at, rows, shape, threads);
    return;
  }
  for (int64_t b = 0; b < rows; ++b) {
    const Row<Stored> row = row_at(b);
    if constexpr (!std::is_same_v<Stored, double>) select_sliced<kAbsolute>(row, slices);
    write_row(row);
  }
}

// Calls visit(Stored{}) with the stored type behind a dtype tag.
template <class Visit>
void visit_type(int dtype, Visit&& visit) {
  if (dtype == 0) {
    visit(float{});
  } else if (dtype == 1) {
    visit(BFloat16{});
  } else if (dtype == 2) {
    visit(Float16{});
  } else {
    visit(double{});
  }
}

}  // namespace

void topk(const void* x, int dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride,
          int64_t k, int flags, void* values, int64_t* indices, void* masked, int64_t* counts,
          int threads) {
  visit_type(dtype, [&](auto tag) {
    using Stored = decltype(tag);
    const int64_t dense_bytes = rows * n * static_cast<int64_t>(sizeof(Stored));
    const Row<Stored> shape{nullptr, n,       col_stride, k,      flags,
                            nullptr, nullptr, nullptr,    counts, dense_bytes >= kLargerThanCaches};
    if (masked != nullptr) advise_huge_pages(masked, static_cast<size_t>(dense_bytes));
    const auto row_at = [&](int64_t b) {
      Row<Stored> row = shape;
      row.x = static_cast<const Stored*>(x) + b * row_stride;
      row.values = static_cast<Stored*>(values) + b * k;
      row.indices = indices + b * k;
      row.masked = masked == nullptr ? nullptr : static_cast<Stored*>(masked) + b * n;
      return row;
    };
    if ((flags & kAbs) != 0) {
      select_all<true>(row_at, rows, shape, threads);
    } else {
      select_all<false>(row_at, rows, shape, threads);
    }
  });
}

void codes_to_dense(const void* values, int dtype, const int64_t* indices, int64_t rows, int64_t k,
                    int64_t n, void* dense, int threads) {
  visit_type(dtype, [&](auto tag) {
    using Stored = decltype(tag);
    const int64_t row_bytes = n * static_cast<int64_t>(sizeof(Stored));
    advise_huge_pages(dense, static_cast<size_t>(rows * row_bytes));
    const bool past_caches = rows * row_bytes >= kLargerThanCaches;
    const double bytes = static_cast<double>(rows) * static_cast<double>(row_bytes);
    const int used = useful_threads(threads, kNanosecondsPerClearedByte * bytes);
    share_out(used, rows, [&](int64_t b) {
      Stored* row = static_cast<Stored*>(dense) + b * n;
      clear(row, row_bytes, past_caches);
      for (int64_t j = b * k; j < (b + 1) * k; ++j) {
        row[indices[j]] = static_cast<const Stored*>(values)[j];
      }
    });
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
