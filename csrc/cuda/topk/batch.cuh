// A batch of rows, and how a team of threads orders and writes the codes of one.
#pragma once

#include "cuda/common/dtypes.cuh"
#include "cuda/common/keys.cuh"
#include "cuda/common/teams.cuh"
#include "cuda/topk/regimes.h"

namespace sparsekern::cuda {

// What a kernel gets: TopkCall with its types.
template <class T>
struct Batch {
  const T* x;
  int64_t rows, row_stride, col_stride;
  int n, k;
  unsigned mask;  // of the bits that are compared
  bool sorted, relu;
  T* values;
  int64_t* indices;
  T* masked;
  unsigned long long* counts;

  __device__ const T* row(int64_t b) const { return x + b * row_stride; }

  __device__ unsigned key(const T* row, int64_t i) const {
    return key_of(row[i * col_stride], mask);
  }

  // Code number `position` of row b is element `index`. The masked row is zero already.
  __device__ void write(int64_t b, int64_t position, unsigned index) const {
    const T stored = write_code(b, position, row(b)[index * col_stride], index);
    const float value = to_float(stored);
    if (masked != nullptr) masked[b * n + index] = stored;
    // Integer additions in any order give one result.
    if (counts != nullptr && value != 0.0f) atomicAdd(&counts[index], 1ull);
  }

  // Code number `position` of row b is x with this index; returns the value that was written.
  __device__ T write_code(int64_t b, int64_t position, T x, int64_t index) const {
    if (relu && to_float(x) <= 0.0f) from_float(0.0f, &x);
    values[b * k + position] = x;
    indices[b * k + position] = index;
    return x;
  }
};

template <class T>
Batch<T> make_batch(const TopkCall& call) {
  return {static_cast<const T*>(call.x.data),
          call.x.rows,
          call.x.row_stride,
          call.x.column_stride,
          static_cast<int>(call.x.columns),
          static_cast<int>(call.k),
          call.abs ? kMagnitude : kSigned,
          call.sorted,
          call.relu,
          static_cast<T*>(call.values),
          call.indices,
          static_cast<T*>(call.masked),
          reinterpret_cast<unsigned long long*>(call.counts)};
}

// Elements that a load of a packed row has.
template <class T>
constexpr int kPacked = kVectorBytes / sizeof(T);

// Whether every row of x can be read 16 bytes at a time.
template <class T>
bool rows_packed(const TopkCall& call) {
  return call.x.column_stride == 1 &&
         reinterpret_cast<uintptr_t>(call.x.data) % kVectorBytes == 0 &&
         call.x.row_stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
}

// The least power of two that is >= x.
inline int64_t power_of_two(int64_t x) {
  int64_t power = 1;
  while (power < x) power *= 2;
  return power;
}

// ---- codes of a row, by a team ----

// pairs[0..size) ascending; size is a power of two. Bitonic: log2(size)^2 / 2 steps, in each of
// which a thread exchanges size / (2 kSize) pairs.
template <class Team>
__device__ void sort_pairs(Pair* pairs, int size) {
  for (int width = 2; width <= size; width *= 2) {
    for (int step = width / 2; step > 0; step /= 2) {
      Team::sync();
      for (int t = Team::self(); t < size / 2; t += Team::kSize) {
        const int i = 2 * t - (t & (step - 1));
        const Pair first = pairs[i];
        const Pair second = pairs[i + step];
        if ((first > second) == ((i & width) == 0)) {
          pairs[i] = second;
          pairs[i + step] = first;
        }
      }
    }
  }
  Team::sync();
}

// pairs[0..count): the first k of row b, k <= count, and perhaps more, in any order, which the team
// has just written. Writes the codes and the masked row: every pair counts those before it, count^2
// comparisons by the team. taken: room for k.
template <class Team, class T>
__device__ void write_ranked(const Batch<T>& batch, int64_t b, const Pair* pairs, int count,
                             unsigned* taken) {
  if (batch.masked != nullptr) write_zeros<Team>(batch.masked + b * batch.n, batch.n);
  Team::sync();
  for (int i = Team::self(); i < count; i += Team::kSize) {
    const Pair own = pairs[i];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < count; ++j) rank += pairs[j] < own;
    if (rank >= batch.k) continue;
    if (batch.sorted) {
      batch.write(b, rank, low_of(own));
    } else {
      taken[rank] = low_of(own);
    }
  }
  if (batch.sorted) return;
  Team::sync();
  for (int i = Team::self(); i < batch.k; i += Team::kSize) {
    const unsigned own = taken[i];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < batch.k; ++j) rank += taken[j] < own;
    batch.write(b, rank, own);
  }
}

// pairs[0..k): the selected (key, index) of row b, which the team has just written. Writes the
// codes and the masked row. size: power_of_two(k), the room in pairs.
template <class Team, class T>
__device__ void write_codes(const Batch<T>& batch, int64_t b, Pair* pairs, int size,
                            bool ascending) {
  if (batch.masked != nullptr) write_zeros<Team>(batch.masked + b * batch.n, batch.n);
  const bool sort = batch.sorted || !ascending;
  if (sort) {
    for (int j = batch.k + Team::self(); j < size; j += Team::kSize) pairs[j] = kNoPair;
    if (!batch.sorted) {
      Team::sync();
      for (int j = Team::self(); j < batch.k; j += Team::kSize) {
        pairs[j] = make_pair_of(low_of(pairs[j]), 0);
      }
    }
    sort_pairs<Team>(pairs, size);
  }
  Team::sync();
  const bool index_is_high = sort && !batch.sorted;
  for (int j = Team::self(); j < batch.k; j += Team::kSize) {
    batch.write(b, j, index_is_high ? high_of(pairs[j]) : low_of(pairs[j]));
  }
}

}  // namespace sparsekern::cuda
