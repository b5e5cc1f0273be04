// A batch of rows and where their codes go; teams of threads that share a row.
#pragma once

#include "cuda/common/keys.cuh"
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

  __device__ unsigned rank(const T* row, int64_t i) const {
    return rank_of(row[i * col_stride], mask);
  }

  // Code number `position` of row b is element `index`. The masked row is zero already.
  __device__ void write(int64_t b, int64_t position, unsigned index) const {
    T stored = row(b)[index * col_stride];
    float value = to_float(stored);
    if (relu && value <= 0.0f) {
      value = 0.0f;
      from_float(value, &stored);
    }
    values[b * k + position] = stored;
    indices[b * k + position] = index;
    if (masked != nullptr) masked[b * n + index] = stored;
    // Integer additions in any order give one result.
    if (counts != nullptr && value != 0.0f) atomicAdd(&counts[index], 1ull);
  }
};

template <class T>
Batch<T> make_batch(const TopkCall& call) {
  return {static_cast<const T*>(call.x),
          call.rows,
          call.row_stride,
          call.col_stride,
          static_cast<int>(call.n),
          static_cast<int>(call.k),
          (call.flags & kAbs) != 0 ? kMagnitude : kSigned,
          (call.flags & kSorted) != 0,
          (call.flags & kRelu) != 0,
          static_cast<T*>(call.values),
          call.indices,
          static_cast<T*>(call.masked),
          reinterpret_cast<unsigned long long*>(call.counts)};
}

// Whether every row of x can be read 16 bytes at a time.
template <class T>
bool rows_packed(const TopkCall& call) {
  return call.col_stride == 1 && reinterpret_cast<uintptr_t>(call.x) % kVectorBytes == 0 &&
         call.row_stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
}

// Calls visit(T()) with the type behind the tag.
template <class Visit>
void visit_dtype(int dtype, Visit&& visit) {
  if (dtype == 0) return visit(float());
  if (dtype == 1) return visit(__nv_bfloat16());
  if (dtype == 2) return visit(__half());
  throw std::runtime_error("the dtype tag must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

inline unsigned grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("more rows than one launch can take");
  return static_cast<unsigned>(blocks);
}

// The least power of two that is >= x.
inline int64_t power_of_two(int64_t x) {
  int64_t power = 1;
  while (power < x) power *= 2;
  return power;
}

// ---- teams ----

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

struct WarpTeam {
  static constexpr int kSize = kWarp;
  __device__ static int self() { return threadIdx.x % kWarp; }
  __device__ static void sync() { __syncwarp(); }
};

struct BlockTeam {
  static constexpr int kSize = kBlockThreads;
  __device__ static int self() { return threadIdx.x; }
  __device__ static void sync() { __syncthreads(); }
};

// out[0..count) = 0, with 16-byte stores where they are aligned.
template <class Team, class T>
__device__ void write_zeros(T* out, int64_t count) {
  constexpr int kItems = kVectorBytes / sizeof(T);
  T zero;
  from_float(0.0f, &zero);
  const int64_t past = reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T);
  const int64_t to_aligned = past == 0 ? 0 : kItems - past;
  const int64_t head = to_aligned < count ? to_aligned : count;
  const int64_t words = (count - head) / kItems;
  if (Team::self() < head) out[Team::self()] = zero;
  uint4* aligned = reinterpret_cast<uint4*>(out + head);
  for (int64_t w = Team::self(); w < words; w += Team::kSize) aligned[w] = uint4{0, 0, 0, 0};
  const int64_t tail = head + words * kItems + Team::self();
  if (tail < count) out[tail] = zero;
}

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

// pairs[0..k): the selected (rank, index) of row b, which the team has just written. Writes the
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
