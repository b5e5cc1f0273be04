// The k smallest of each row: the k largest of a copy whose elements have the order reversed.
//
// The copy holds the next number above -x, which reverses the order and leaves -inf free for NaN,
// which comes last; NaN itself stands for -inf, which comes first.
#include "cuda/topk/batch.cuh"

namespace sparsekern::cuda {

namespace {

// Stored numbers as integers: the bits of a number without its sign, and those of +inf.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = unsigned;
  static constexpr unsigned kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
};
template <>
struct Bits<__nv_bfloat16> {
  using type = unsigned short;
  static constexpr unsigned kMagnitude = 0x7fffu, kInfinity = 0x7f80u;
};
template <>
struct Bits<__half> {
  using type = unsigned short;
  static constexpr unsigned kMagnitude = 0x7fffu, kInfinity = 0x7c00u;
};

// reversed[b, i] = the next number above -x[b, i], or above -|x[b, i]|. A thread owns one element.
// Bound by the read of x and the write of the copy.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    topk_reverse_kernel(Batch<T> batch, T* reversed, int64_t total) {
  constexpr unsigned kSign = Bits<T>::kMagnitude + 1u;
  constexpr unsigned kInfinity = Bits<T>::kInfinity;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (e >= total) return;
  const T x = batch.row(e / batch.n)[e % batch.n * batch.col_stride];
  typename Bits<T>::type bits;
  __builtin_memcpy(&bits, &x, sizeof(T));
  const unsigned magnitude = bits & Bits<T>::kMagnitude;
  const bool negative = (bits & kSign) != 0 && batch.mask == kSigned;
  unsigned next = kSign | (magnitude - 1u);                // of -x below zero: nearer to it
  if (negative || magnitude == 0u) next = magnitude + 1u;  // above +inf that is a NaN
  if (magnitude > kInfinity) next = kSign | kInfinity;
  bits = static_cast<typename Bits<T>::type>(next);
  __builtin_memcpy(reversed + e, &bits, sizeof(T));
}

// Codes written anew, by their indices, with the numbers of x. A thread owns one code. Bound by one
// sector of x for each.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) topk_values_kernel(Batch<T> batch, int64_t total) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (e < total) batch.write(e / batch.k, e % batch.k, static_cast<unsigned>(batch.indices[e]));
}

int64_t copy_bytes(const TopkArguments& call) {
  const int64_t size = call.x.dtype == kFloat32 ? 4 : 2;
  return (call.x.rows * call.x.columns * size + 15) / 16 * 16;  // what follows it is aligned, too
}

TopkArguments of_copy(const TopkArguments& call, void* copy) {
  TopkArguments largest = call;
  largest.x = {copy, call.x.dtype, call.x.rows, call.x.columns, call.x.columns, 1};
  largest.relu = largest.abs = largest.smallest = false;
  largest.counts = nullptr;
  return largest;
}

unsigned blocks_for(int64_t threads) {
  return grid_of((threads + kBlockThreads - 1) / kBlockThreads);
}

}  // namespace

int64_t smallest_workspace(const TopkArguments& call) {
  return copy_bytes(call) + topk_workspace(of_copy(call, nullptr));
}

void topk_smallest(const TopkCall& call) {
  visit_dtype("topk", call.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Batch<T> batch = make_batch<T>(call);
    const int64_t elements = call.x.rows * call.x.columns, codes = call.x.rows * call.k;
    launch(topk_reverse_kernel<T>, blocks_for(elements), kBlockThreads, 0, call.stream, batch,
           static_cast<T*>(call.workspace), elements);
    topk(of_copy(call, call.workspace), static_cast<char*>(call.workspace) + copy_bytes(call),
         call.stream);
    launch(topk_values_kernel<T>, blocks_for(codes), kBlockThreads, 0, call.stream, batch, codes);
  });
}

}  // namespace sparsekern::cuda
