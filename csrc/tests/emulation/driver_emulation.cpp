// Checks of the emulation itself: what a kernel relies on, and mistakes that must be noticed.
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/common/launch.cuh"
#include "tests/emulation/driver.h"

namespace sparsekern::emulation {
namespace {

using cuda::launch;

constexpr unsigned full = 0xffffffffu;

// Sum over the block by shuffles inside the warps and shared memory between them.
__global__ void block_sum_kernel(const int* x, int n, int* sums) {
  __shared__ int partial[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  int sum = i < n ? x[i] : 0;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(full, sum, step);
  if (lane == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;  // warp 0 goes on alone
  sum = lane < static_cast<int>(blockDim.x / 32) ? partial[lane] : 0;
  sum = __reduce_add_sync(full, sum);
  if (lane == 0) sums[blockIdx.x] = sum;
}

// Many barriers in a row; thread t returns after round t % 8, the others must not wait for it.
__global__ void early_return_kernel(int* rounds) {
  SPARSEKERN_DYNAMIC_SHARED(int, shared);
  for (int round = 0; round < 8; ++round) {
    shared[threadIdx.x] = round;
    __syncthreads();
    rounds[threadIdx.x] += shared[threadIdx.x ^ 8] == round ? 1 : 100;
    __syncthreads();
    if (static_cast<int>(threadIdx.x % 8) == round) return;
  }
}

__global__ void warp_kernel(const uint64_t* x, uint64_t* out) {
  const int lane = threadIdx.x % 32;
  const uint64_t mine = x[threadIdx.x];
  uint64_t hash = __shfl_sync(full, mine, 31 - lane);
  hash = hash * 31 + __shfl_xor_sync(full, mine, 5);
  hash = hash * 31 + __shfl_up_sync(full, mine, 3);
  hash = hash * 31 + __shfl_sync(full, mine, lane + 1, 8);
  hash = hash * 31 + __ballot_sync(full, mine % 3 == 0);
  hash = hash * 31 + (__any_sync(full, lane == 7) != 0) + 2 * (__all_sync(full, lane != 7) != 0);
  hash = hash * 31 + __reduce_max_sync(full, static_cast<int>(mine % 1000) - 500);
  hash = hash * 31 + __reduce_min_sync(full, static_cast<unsigned>(mine % 1000));
  out[threadIdx.x] = hash;
}

uint64_t expected_warp(const uint64_t* x, int lane) {
  uint64_t hash = x[31 - lane], ballot = 0;
  int most = -1000;
  unsigned least = ~0u;
  for (int i = 0; i < 32; ++i) {
    ballot |= uint64_t{x[i] % 3 == 0} << i;
    most = std::max(most, static_cast<int>(x[i] % 1000) - 500);
    least = std::min(least, static_cast<unsigned>(x[i] % 1000));
  }
  hash = hash * 31 + x[lane ^ 5];
  hash = hash * 31 + x[lane >= 3 ? lane - 3 : lane];
  hash = hash * 31 + x[(lane & ~7) | ((lane + 1) & 7)];
  hash = hash * 31 + ballot;
  hash = hash * 31 + 1;
  hash = hash * 31 + most;
  return hash * 31 + least;
}

// Atomics on both kinds of memory, a count over the block, and barriers inside a loop whose length
// differs from block to block.
__global__ void atomic_kernel(unsigned long long* total, int* most, int* least, int* counts) {
  __shared__ int histogram[8];
  if (threadIdx.x < 8) histogram[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned round = 0; round <= blockIdx.x; ++round) {
    atomicAdd(&histogram[threadIdx.x % 8], 1);
    __syncthreads();
  }
  atomicAdd(total, static_cast<unsigned long long>(histogram[threadIdx.x % 8]));
  atomicMax(most, static_cast<int>(threadIdx.x + blockIdx.x));
  atomicMin(least, -static_cast<int>(threadIdx.x));
  const int odd = __syncthreads_count(threadIdx.x % 2);
  const int any = __syncthreads_or(threadIdx.x == 77), none = __syncthreads_or(0);
  if (threadIdx.x == 0) counts[blockIdx.x] = odd + 1000 * any + 10000 * none;
}

// One warp takes another way than its neighbours and synchronises inside it.
__global__ void divergent_kernel(int* out) {
  __shared__ int passed[64];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < 5; ++i) {
      passed[lane] = lane + i;
      __syncwarp();
      const int neighbour = passed[(lane + 1) % 32];
      __syncwarp();
      out[threadIdx.x] = neighbour;
    }
  } else {
    out[threadIdx.x] = __popc(__ballot_sync(full, lane < 10));
  }
  __syncthreads();
}

__global__ void endless_wait_kernel() {
  if (threadIdx.x == 5) __syncwarp();
  __syncthreads();
}

__global__ void mixed_warp_kernel() {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __shfl_sync(full, 1, 0);
  }
}

__global__ void two_barriers_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 0;
    __syncthreads();
  }
}

__global__ void unwritten_kernel(unsigned* out) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, shared);
  out[threadIdx.x] = shared[threadIdx.x];
}

// The mistakes that --plant commits; a sanitizer must report them.
__global__ void race_kernel(int* out) {
  SPARSEKERN_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  // __syncthreads() belongs here
  out[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
}

__global__ void shuffle_race_kernel(int* out) {
  SPARSEKERN_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __shfl_sync(full, 1, 0);  // orders no memory
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void overrun_kernel(int* out, int count) {
  SPARSEKERN_DYNAMIC_SHARED(int, shared);
  shared[static_cast<int>(threadIdx.x) + count - 31] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void overrun_global_kernel(int* out) { out[threadIdx.x + 1] = 1; }

class Cases {
 public:
  explicit Cases(int* count) : count_(count) {}

  void expect(bool holds, const char* what) {
    ++*count_;
    if (holds) return;
    ++failures_;
    std::printf("emulation: %s failed\n", what);
  }

  // The launch must throw, with these words.
  void expect_refused(const std::function<void()>& launches, const char* words, const char* what) {
    std::string message;
    try {
      launches();
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    expect(message.find(words) != std::string::npos, what);
    if (message.find(words) == std::string::npos) std::printf("  said: %s\n", message.c_str());
  }

  int failures() const { return failures_; }

 private:
  int* count_;
  int failures_ = 0;
};

void check_barriers(Cases& cases) {
  for (const int threads : {32, 96, quick ? 256 : 1024}) {
    const int n = 5 * threads - 7, blocks = 5;
    std::vector<int> x(n), sums(blocks, -1), expected(blocks, 0);
    for (int i = 0; i < n; ++i) {
      x[i] = i * 7919 % 1001 - 500;
      expected[i / threads] += x[i];
    }
    launch(block_sum_kernel, blocks, threads, 0, nullptr, x.data(), n, sums.data());
    cases.expect(sums == expected, "sum over a block");

    std::vector<int> rounds(threads, 0);
    bool right = true;
    launch(early_return_kernel, 1, threads, sizeof(int) * threads, nullptr, rounds.data());
    for (int i = 0; i < threads; ++i) right = right && rounds[i] == i % 8 + 1;
    cases.expect(right, "early returns");
  }
}

void check_warps(Cases& cases) {
  for (int repeat = 0; repeat < 2; ++repeat) {  // forwards and backwards
    std::vector<uint64_t> x(64), out(64);
    for (size_t i = 0; i < x.size(); ++i) x[i] = (i + 3) * 0x9E3779B97F4A7C15u;
    launch(warp_kernel, 1, 64, 0, nullptr, x.data(), out.data());
    bool right = true;
    for (int i = 0; i < 64; ++i) right = right && out[i] == expected_warp(&x[i / 32 * 32], i % 32);
    cases.expect(right, "warp functions");

    std::vector<int> way(64);
    launch(divergent_kernel, 1, 64, 0, nullptr, way.data());
    right = true;
    for (int i = 0; i < 64; ++i) right = right && way[i] == (i < 32 ? (i + 1) % 32 + 4 : 10);
    cases.expect(right, "warps that part");
  }
}

void check_atomics(Cases& cases) {
  unsigned long long total = 0;
  int most = -1, least = 1;
  std::vector<int> counts(3);
  launch(atomic_kernel, 3, 128, 0, nullptr, &total, &most, &least, counts.data());
  cases.expect(total == 128 * 16 * (1 + 2 + 3), "atomicAdd");
  cases.expect(most == 129 && least == -127, "atomicMax and atomicMin");
  cases.expect(counts == std::vector<int>(3, 1064), "counts over a block");
}

void check_misuse(Cases& cases) {
  std::vector<int> out(64);
  std::vector<unsigned> words(64);
  cases.expect_refused([&] { launch(endless_wait_kernel, 1, 64, 0, nullptr); },
                       "thread 5 in __syncwarp", "endless wait");
  cases.expect_refused([&] { launch(mixed_warp_kernel, 1, 32, 0, nullptr); }, "a shuffle",
                       "different warp functions");
  cases.expect_refused([&] { launch(two_barriers_kernel, 1, 64, 0, nullptr, out.data()); },
                       "must act together", "two different barriers");
  cases.expect_refused([&] { launch(unwritten_kernel, 1, 48, 0, nullptr, words.data()); }, "got 48",
                       "half a warp");
  cases.expect_refused(
      [&] { launch(unwritten_kernel, dim3(1, 65536), 32, 0, nullptr, words.data()); }, "blocks",
      "large grid");
  cases.expect_refused([&] { launch(unwritten_kernel, 1, 32, 170000, nullptr, words.data()); },
                       "shared memory", "large shared memory");
  launch(unwritten_kernel, 1, 64, 256, nullptr, words.data());
  cases.expect(words == std::vector<unsigned>(64, 0xCDCDCDCD), "unwritten shared memory");
  launch(unwritten_kernel, 0, 64, 256, nullptr, nullptr);
  cases.expect(true, "empty grid");
}

// Barriers, warp functions, atomics, misuse that must be noticed.
int check_emulation(int* count) {
  Cases cases(count);
  check_barriers(cases);
  check_warps(cases);
  check_atomics(cases);
  check_misuse(cases);
  check_barriers(cases);  // the emulation goes on after a launch that failed
  return cases.failures();
}

const Checks kChecks("emulation", check_emulation);

}  // namespace

bool plant(const std::string& mistake) {
  std::vector<int> out(64);
  const size_t bytes = sizeof(int) * out.size();
  if (mistake == "race") {
    launch(race_kernel, 1, 64, bytes, nullptr, out.data());
  } else if (mistake == "race-shuffle") {
    launch(shuffle_race_kernel, 1, 64, bytes, nullptr, out.data());
  } else if (mistake == "overrun") {
    launch(overrun_kernel, 1, 32, bytes, nullptr, out.data(), 64);
  } else if (mistake == "overrun-global") {
    launch(overrun_global_kernel, 1, 64, 0, nullptr, out.data());
  } else {
    return false;
  }
  return true;
}

}  // namespace sparsekern::emulation
