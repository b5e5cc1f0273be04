// How often each latent fired: a histogram of the indices.
#include "cuda/common/dtypes.cuh"
#include "cuda/common/indices.cuh"
#include "cuda/common/packs.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
// Below this many latents each block keeps its own histogram (16 KiB of shared memory): the fewer
// the latents, the more threads want the same counter.
constexpr int64_t kSharedLatents = 4096;
// Entries of a thread of those blocks, so that adding up the histograms is a small part of the
// work.
constexpr int64_t kEntriesPerThread = 16;
// Enough for all threads of the largest GPU, four times over.
constexpr int64_t kBlocks = 4096;

// Whether the entry counts: no values, or a value that is not zero, of either sign. NaN is not
// zero.
template <class Values>
__device__ bool fired(const Values* values, int64_t position) {
  return values == nullptr || to_float(values[position]) != 0.0f;
}

// counts[i] += entries of latent i that fired. A thread takes every (threads of the grid)-th entry.
// Integer atomics: the sum does not depend on their order. Bound by the L2 cache's atomics (about
// one per clock and slice) or, when most entries fall on one latent, by that latent's counter.
template <class Values>
__global__ void __launch_bounds__(kThreads)
    count_active_kernel(Indices indices, int64_t count, const Values* values,
                        unsigned long long* counts) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < count;
       e += step) {
    const int latent = indices.at(e);
    if (latent >= 0 && fired(values, e)) atomicAdd(&counts[latent], 1ull);
  }
}

// The same with a histogram per block in shared memory, added to the counts at the end. Bound by
// reading the entries and by conflicts between a warp's counters. A block counts fewer than 2^32
// entries: the launcher sees to it.
template <class Values>
__global__ void __launch_bounds__(kThreads)
    count_active_few_kernel(Indices indices, int64_t count, const Values* values,
                            unsigned long long* counts) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, own);
  const int n = static_cast<int>(indices.n);
  for (int i = threadIdx.x; i < n; i += kThreads) own[i] = 0;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < count;
       e += step) {
    const int latent = indices.at(e);
    if (latent >= 0 && fired(values, e)) atomicAdd(&own[latent], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (own[i] != 0) atomicAdd(&counts[i], static_cast<unsigned long long>(own[i]));
  }
}

template <class Values>
void count_entries(const Indices& indices, int64_t count, const void* values, int64_t* counts,
                   cudaStream_t stream) {
  const Values* typed = static_cast<const Values*>(values);
  auto* unsigned_counts = reinterpret_cast<unsigned long long*>(counts);
  const bool few = indices.n <= kSharedLatents;
  const int64_t per_block = kThreads * (few ? kEntriesPerThread : 1);
  const int64_t wanted = (count + per_block - 1) / per_block;
  // Past the limit a block takes more entries, up to 2^32 - 1 of them (count below 2^44).
  const unsigned grid = static_cast<unsigned>(wanted < kBlocks ? wanted : kBlocks);
  if (few) {
    launch(count_active_few_kernel<Values>, grid, kThreads,
           static_cast<size_t>(indices.n) * sizeof(unsigned), stream, indices, count, typed,
           unsigned_counts);
  } else {
    launch(count_active_kernel<Values>, grid, kThreads, 0, stream, indices, count, typed,
           unsigned_counts);
  }
}

}  // namespace

void count_active(const CountActiveArguments& call, cudaStream_t stream) {
  const Codes& codes = call.codes;
  const Indices indices = make_indices("count_active", codes.indices, codes.index_type, call.n);
  if (codes.count() == 0 || call.n == 0) return;
  const Dtype dtype = codes.values == nullptr ? kFloat32 : codes.dtype;
  visit_dtype("count_active", dtype, [&](auto value) {
    count_entries<decltype(value)>(indices, codes.count(), codes.values, call.counts, stream);
  });
}

}  // namespace sparsekern::cuda
