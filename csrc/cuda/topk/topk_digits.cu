// Any row and any k: the bound by counting digits of the keys, the most significant first, then the
// codes by ascending index. Used where k is too large for the other ways.
#include "cuda/topk/ordered.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kDigitBits = 11;  // three passes over float32, two over the others
constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsPerThread = kDigits / kBlockThreads;

// What the digits so far have decided: the upper bits of the bound and how many of those that share
// them are wanted.
struct Prefix {
  unsigned value;
  int wanted;
};

// histogram[d] = elements whose key starts with the prefix (above bit `high`) and goes on with
// digit d (from bit `shift`).
template <class T>
__device__ void count_digits(const Batch<T>& batch, const T* row, unsigned* histogram,
                             unsigned prefix, int high, int shift) {
  for (int d = threadIdx.x; d < kDigits; d += kBlockThreads) histogram[d] = 0;
  __syncthreads();
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < batch.n; i += kBlockThreads) {
    const unsigned key = batch.key(row, i);
    // A shift by all 32 bits is not defined, hence in two steps.
    if ((key ^ prefix) >> (high - 1) >> 1 == 0) {
      atomicAdd(&histogram[(key >> shift) & ((1u << (high - shift)) - 1)], 1u);
    }
  }
  __syncthreads();
}

// Extends the prefix by the digit in which the wanted-th element lies. One thread finds it, and
// tells the others through *found.
__device__ inline Prefix extend(BlockReduce& reduce, const unsigned* histogram, Prefix* found,
                                Prefix prefix, int shift) {
  const int first = threadIdx.x * kDigitsPerThread;
  int own = 0;
  for (int d = 0; d < kDigitsPerThread; ++d) own += static_cast<int>(histogram[first + d]);
  int before = reduce.before_warp(own) + warp_sum_upto(own) - own;
  if (before < prefix.wanted && prefix.wanted <= before + own) {
    int digit = first;
    while (before + static_cast<int>(histogram[digit]) < prefix.wanted) {
      before += static_cast<int>(histogram[digit++]);
    }
    *found = {prefix.value | static_cast<unsigned>(digit) << shift, prefix.wanted - before};
  }
  __syncthreads();
  return *found;
}

// A block owns a row and walks it in steps of 256 elements: two or three times to count, twice more
// to take the codes in order. Bound by those reads, of which the later ones hit the L2 cache while
// all rows in flight fit in it; with few rows by the loads that one block keeps in flight. Where
// the codes go to shared memory they are sorted there, otherwise a code is written as it is found,
// or its pair in the place of its index for write_sorted().
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    topk_digits_kernel(Batch<T> batch, bool sort_here, int size) {
  SPARSEKERN_DYNAMIC_SHARED(Pair, pairs);
  __shared__ unsigned histogram[kDigits];
  __shared__ Prefix found;
  const int64_t b = blockIdx.x;
  const T* row = batch.row(b);
  BlockReduce reduce;
  Prefix prefix{0, batch.k};
  for (int high = 32 - key_shift<T>; high > 0; high -= kDigitBits) {
    const int shift = high > kDigitBits ? high - kDigitBits : 0;
    count_digits(batch, row, histogram, prefix.value, high, shift);
    prefix = extend(reduce, histogram, &found, prefix, shift);
  }
  if (!sort_here && batch.masked != nullptr) {
    write_zeros<BlockTeam>(batch.masked + b * batch.n, batch.n);
  }
  __syncthreads();
  Pair* out = reinterpret_cast<Pair*>(batch.indices) + b * batch.k;
  take_in_order(
      reduce, batch.n, Bound{prefix.value, 0}, prefix.wanted,
      [&](int64_t i) { return batch.key(row, i); },
      [&](int position, int64_t i, unsigned key) {
        const unsigned index = static_cast<unsigned>(i);
        if (!batch.sorted) {
          batch.write(b, position, index);
        } else {
          (sort_here ? pairs : out)[position] = make_pair_of(key, index);
        }
      });
  if (!sort_here) return;
  __syncthreads();
  write_codes<BlockTeam>(batch, b, pairs, size, true);
}

template <class T>
void select_digits(const TopkCall& call) {
  const Batch<T> batch = make_batch<T>(call);
  const bool sort_here = batch.sorted && call.k <= kSharedSort;
  const int size = sort_here ? static_cast<int>(power_of_two(call.k)) : 0;
  launch(topk_digits_kernel<T>, grid_of(call.x.rows), kBlockThreads, size * sizeof(Pair),
         call.stream, batch, sort_here, size);
  if (batch.sorted && !sort_here) write_sorted(call);
}

}  // namespace

void topk_digits(const TopkCall& call) {
  visit_dtype("topk", call.x.dtype, [&](auto tag) { select_digits<decltype(tag)>(call); });
}

}  // namespace sparsekern::cuda
