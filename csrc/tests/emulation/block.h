// The emulated grid: blocks run one after another, the threads of a block take turns.
//
// What ThreadSanitizer is told: a launch and a block boundary order everything, __syncthreads
// orders the block, __syncwarp orders the warp. Shuffles and votes exchange their operands and
// order nothing else, as the CUDA manual has it; so a kernel that leans on more is reported as a
// race. Waits that can never end, and warp functions or barriers that do not match, end the launch
// with std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};

namespace sparsekern::emulation {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned max_threads = 1024;

// The least of sm_80, sm_90 and sm_100: what a kernel may use on all of them.
constexpr size_t max_shared_bytes = 163 * 1024;

using Where = std::source_location;

// Where the running thread finds itself. Written by the scheduler at each turn.
struct Place {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Place place;

// Calls body() once in each thread of the grid.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// Start of the block's dynamic shared memory: exactly as many bytes as the launch asked for.
void* dynamic_shared();

// The names of functions that the lanes of a warp, or the threads of a block, must call together.
enum class Together {
  syncthreads,
  syncthreads_count,
  syncthreads_or,
  syncwarp,
  shuffle,
  vote,
  reduce
};

// __syncthreads; returns over how many threads of the block the predicate holds.
int sync_block(Together kind, bool predicate, Where where);

void sync_warp(Where where);

// One operand of each lane; bit i of `present` says that lane i has not returned from the kernel.
struct Operands {
  uint64_t lane[kWarpLanes];
  uint32_t present;
  unsigned self;  // the calling lane
};
Operands exchange(Together kind, uint64_t mine, Where where);

// Warp functions are emulated for the full mask only; ends the program for any other.
void require_full_mask(unsigned mask, Where where);

}  // namespace sparsekern::emulation
