// Codes of a tensor [outer, channels, inner] with what the kernels want to know of them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/channels.cuh"
#include "cuda/common/indices.cuh"

namespace sparsekern::cuda {

// One code, in one load of 16 bytes. One that lies outside has the first site and the first channel
// that do not exist, and the value 0.
struct __align__(16) Code {
  int64_t site;
  int channel;
  float value;
};

struct CodeList {
  const void* values;
  Indices indices;
  int64_t count, outer, channels, inner;
};

// `function` is for the messages.
inline CodeList list_codes(const char* function, const Codes& codes, int64_t outer,
                           int64_t channels, int64_t inner) {
  if (codes.count() > 0x7fffffff || channels > 0x7fffffff) {
    throw std::runtime_error(std::string(function) + " takes fewer than 2^31 codes and channels");
  }
  const int64_t size = outer * channels * inner;
  return {codes.values,  make_indices(function, codes.indices, codes.index_type, size),
          codes.count(), outer,
          channels,      inner};
}

// codes[m] = code m, a thread each. Bound by latency and by reading the codes.
template <class Values>
__global__ void __launch_bounds__(kChannelThreads) locate_codes_kernel(CodeList list, Code* codes) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x;
  if (m >= list.count) return;
  const int64_t index = list.indices.unchecked(m);
  const int64_t block = list.channels * list.inner;
  Code code{list.outer * list.inner, static_cast<int>(list.channels), 0.0f};
  if (index >= 0 && index < list.outer * block) {
    const int64_t o = quotient(index, block);
    const int64_t rest = index - o * block;
    const int64_t channel = quotient(rest, list.inner);
    code.site = o * list.inner + rest - channel * list.inner;
    code.channel = static_cast<int>(channel);
    code.value = to_float(static_cast<const Values*>(list.values)[m]);
  }
  codes[m] = code;
}

template <class Values>
void locate_codes(const CodeList& list, Code* codes, cudaStream_t stream) {
  launch(locate_codes_kernel<Values>, grid_of(divide_up(list.count, kChannelThreads)),
         kChannelThreads, 0, stream, list, codes);
}

// The first place of 0..count whose key is not below the target, for ascending keys. For a whole
// warp, which looks at 32 places at once: four rounds for a million codes.
template <class KeyAt>
__device__ int64_t first_not_below(int64_t count, int64_t target, const KeyAt& key_at) {
  const int lane = threadIdx.x % kWarp;
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t width = high - low;
    const unsigned below = __ballot_sync(kFullMask, key_at(low + width * lane / kWarp) < target);
    const int passed = __popc(below);
    if (passed == 0) return low;
    if (passed < kWarp) high = low + width * passed / kWarp;
    low += width * (passed - 1) / kWarp + 1;
  }
  return low;
}

}  // namespace sparsekern::cuda
