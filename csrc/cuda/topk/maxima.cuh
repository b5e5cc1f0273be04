// The best element of each group of a row: a bound before any element is kept.
#pragma once

#include <type_traits>

#include "cuda/topk/bound.cuh"

namespace sparsekern::cuda {

constexpr int kGroupsHeld = 16;  // the most groups of a thread, whose keys it holds in registers

// The larger of the numbers in two words (one float32, or two 16-bit numbers); NaN where either is.
template <class T>
__device__ inline unsigned larger(unsigned a, unsigned b) {
#ifdef SPARSEKERN_EMULATION
  constexpr int kNumbers = sizeof(unsigned) / sizeof(T);
  T x[kNumbers], y[kNumbers];
  __builtin_memcpy(x, &a, sizeof a);
  __builtin_memcpy(y, &b, sizeof b);
  for (int c = 0; c < kNumbers; ++c) {
    const float first = to_float(x[c]), second = to_float(y[c]);
    if (second != second || second > first) x[c] = y[c];
  }
  __builtin_memcpy(&a, x, sizeof a);
  return a;
#else
  unsigned c;
  if constexpr (std::is_same<T, float>::value) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;"
        : "=f"(result)
        : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    c = __float_as_uint(result);
  } else if constexpr (std::is_same<T, __half>::value) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#endif
}

// A stretch of a row, read kWidth elements at a time: a vector is one 16-byte word of a packed row,
// or one element. Elements past the end are the last of the total order.
template <class T, int kWidth>
class Stretch {
 public:
  struct Vector {
    T item[kWidth];
  };

  __device__ Stretch(const Batch<T>& batch, int64_t b, int64_t begin, unsigned count)
      : elements_(batch.row(b) + begin * batch.col_stride),
        stride_(batch.col_stride),
        count_(count) {
    from_float(batch.mask == kSigned ? -INFINITY : 0.0f, &last_);
  }

  __device__ unsigned count() const { return count_; }
  __device__ unsigned vectors() const { return (count_ + kWidth - 1) / kWidth; }
  __device__ T last() const { return last_; }

  // Vector v, all of whose elements exist.
  __device__ Vector load_whole(unsigned v) const {
    Vector vector;
    if constexpr (kWidth > 1) {
      Pack<T, kWidth> pack;
      pack.load(elements_ + static_cast<int64_t>(v) * kWidth);
      __builtin_memcpy(vector.item, pack.item, sizeof vector);
    } else {
      vector.item[0] = elements_[v * stride_];
    }
    return vector;
  }

  __device__ Vector load(unsigned v) const {
    if (v < count_ / kWidth) return load_whole(v);
    Vector vector;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const int64_t i = static_cast<int64_t>(v) * kWidth + c;
      vector.item[c] = i < count_ ? elements_[i * stride_] : last_;
    }
    return vector;
  }

 private:
  const T* elements_;
  int64_t stride_;
  unsigned count_;
  T last_;
};

// How vectors are dealt to groups: `count` groups a thread, of 2^shift vectors each. Vector s of
// group g of thread t is number (g * 2^shift + s) * Team::kSize + t, so that a team reads
// neighbouring vectors together.
template <class Team>
struct Groups {
  int count, shift;

  __device__ explicit Groups(unsigned vectors) : shift(0) {
    const unsigned each = (vectors + Team::kSize - 1) / Team::kSize;
    while (static_cast<unsigned>(kGroupsHeld) << shift < each) ++shift;
    count = static_cast<int>((each + (1u << shift) - 1) >> shift);
  }

  // A group's number among those of the team is g * Team::kSize + t.
  __device__ unsigned vector(unsigned group, unsigned s) const {
    return ((group / Team::kSize << shift) + s) * Team::kSize + group % Team::kSize;
  }
};

// The first of many elements, two side by side if they have 16 bits: an element costs a mask and a
// maximum, half of each if it has 16 bits.
template <class T, int kWidth>
class First {
 public:
  using Vector = typename Stretch<T, kWidth>::Vector;

  __device__ First(const Stretch<T, kWidth>& stretch, unsigned mask)
      : mask_(mask), word_mask_(kNumbers == 1 ? mask : mask >> 16 | (mask & 0xffff0000u)) {
    T filler[kNumbers];
    for (int c = 0; c < kNumbers; ++c) filler[c] = stretch.last();
    __builtin_memcpy(&none_, filler, sizeof none_);
    best_ = none_;
  }

  __device__ void clear() { best_ = none_; }

  __device__ void add(const Vector& vector) {
    unsigned words[kWords];
    words[0] = none_;  // whose upper half stays where one 16-bit element is a vector
    __builtin_memcpy(words, vector.item, sizeof vector);
#pragma unroll
    for (int w = 0; w < kWords; ++w) best_ = larger<T>(best_, words[w] & word_mask_);
  }

  __device__ unsigned key() const {
    T numbers[kNumbers];
    __builtin_memcpy(numbers, &best_, sizeof best_);
    const unsigned key = key_of(numbers[0], mask_);
    if constexpr (kNumbers == 2) {
      const unsigned other = key_of(numbers[1], mask_);
      return other < key ? other : key;
    }
    return key;
  }

  // Whether it comes before the key of which `number` is float_of; without a mask.
  __device__ bool exceeds(float number) const {
    T numbers[kNumbers];
    __builtin_memcpy(numbers, &best_, sizeof best_);
    bool exceeds = !(to_float(numbers[0]) <= number);
    if constexpr (kNumbers == 2) exceeds |= !(to_float(numbers[1]) <= number);
    return exceeds;
  }

 private:
  static constexpr int kNumbers = sizeof(unsigned) / sizeof(T);
  static constexpr int kWords = kWidth / kNumbers > 0 ? kWidth / kNumbers : 1;

  unsigned mask_, word_mask_, none_, best_;
};

// Vectors that a thread loads at once: 64 bytes (16 elements that are not packed) in flight.
template <int kWidth>
constexpr int kVectorsAtOnce = kWidth > 1 ? 4 : 16;

// Loads the team's next vectors, each thread every kSize-th from first + Team::self() on.
template <class Team, class T, int kWidth, int kAtOnce>
__device__ void load_vectors(const Stretch<T, kWidth>& stretch, unsigned first,
                             typename Stretch<T, kWidth>::Vector (&vectors)[kAtOnce]) {
  const unsigned own = first + Team::self();
  if (first + kAtOnce * Team::kSize <= stretch.count() / kWidth) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) vectors[u] = stretch.load_whole(own + u * Team::kSize);
  } else {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) vectors[u] = stretch.load(own + u * Team::kSize);
  }
}

// Writes the key of each group's first element to keys[number of the group]: bound by one read of
// the stretch.
template <class Team, class T, int kWidth>
__device__ void write_maxima(const Stretch<T, kWidth>& stretch, const Groups<Team>& groups,
                             unsigned mask, unsigned* keys) {
  constexpr int kAtOnce = kVectorsAtOnce<kWidth>;
  const unsigned each = static_cast<unsigned>(groups.count) << groups.shift;
  const unsigned size = 1u << groups.shift;
  First<T, kWidth> best(stretch, mask);
  for (unsigned first = 0; first < each; first += kAtOnce) {
    typename Stretch<T, kWidth>::Vector vectors[kAtOnce];
    load_vectors<Team>(stretch, first * Team::kSize, vectors);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      best.add(vectors[u]);
      const unsigned end = first + u + 1;
      if ((end & (size - 1)) != 0 || end > each) continue;
      keys[((end >> groups.shift) - 1) * Team::kSize + Team::self()] = best.key();
      best.clear();
    }
  }
}

// A bound of the k-th key: the k-th of the groups' first elements, or one that up to k / 8 more
// groups reach; `count` groups reach it. keys: those of the thread's groups, kNoKey past them.
template <class Team>
__device__ Bound bound_of_maxima(const unsigned (&keys)[kGroupsHeld], const Groups<Team>& groups,
                                 int k) {
  // Fewer groups prove nothing, and there are no more elements than 16 bytes a group.
  if (groups.count * Team::kSize < k) return {kNoKey, groups.count * Team::kSize};
  TeamReduce<Team> reduce;
  return bound_of(reduce, keys, k, k / 8);
}

}  // namespace sparsekern::cuda
