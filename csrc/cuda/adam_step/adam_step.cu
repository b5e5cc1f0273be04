// One step of Adam, and of Adam on rows of norm 1.
#include "cuda/common/warp.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Elements of a thread where rows do not matter: enough loads under way, few blocks.
constexpr int64_t kPerThread = 8;
// The longest row that a block holds in registers has 4096 elements.
constexpr int kMostHeld = 16;

struct Matrices {
  float* parameter;   // [rows, d]
  const float* grad;  // [rows, d]
  float* mean;        // [rows, d]
  float* square;      // [rows, d]
};

struct Step {
  float step_size, new_mean, beta2, new_square, root_scale, eps, weight_decay;
};

// The new parameter; mean and square are written.
__device__ float step_element(const Matrices& m, const Step& s, int64_t i, float parameter,
                              float decay) {
  const float g = m.grad[i] + decay * parameter;
  const float mean = m.mean[i] + s.new_mean * (g - m.mean[i]);
  const float square = s.beta2 * m.square[i] + s.new_square * g * g;
  m.mean[i] = mean;
  m.square[i] = square;
  return parameter - s.step_size * mean / (sqrtf(square) * s.root_scale + s.eps);
}

// parameter -= step_size * mean / (sqrt(square) * root_scale + eps), element by element. Neighbours
// in a warp take neighbours in memory. Bound by memory: 28 bytes an element.
__global__ void __launch_bounds__(kThreads) adam_step_kernel(Matrices m, Step s, int64_t count) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread + threadIdx.x;
  for (int64_t u = 0; u < kPerThread; ++u) {
    const int64_t i = first + u * kThreads;
    if (i < count) m.parameter[i] = step_element(m, s, i, m.parameter[i], s.weight_decay);
  }
}

// The sum of x over the block, in every thread; the same tree every time.
__device__ float block_sum(float x, float* parts) {
  const float own = warp_sum(x);
  __syncthreads();  // the parts of the sum before have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = own;
  __syncthreads();
  return warp_sum(threadIdx.x % kWarp < kWarps ? parts[threadIdx.x % kWarp] : 0.0f);
}

// The thread's elements of a row: in registers where the row has at most kHeld * kThreads of them
// (kHeld > 0), else in memory, where the passes after the first find them in a cache.
template <int kHeld>
struct RowElements {
  float* row;
  int64_t d;
  float held[kHeld > 0 ? kHeld : 1];

  // visit(f, &element) for each; the first visit loads them and changes nothing, the last stores.
  template <class Visit>
  __device__ void each(bool first, bool last, const Visit& visit) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int64_t f = threadIdx.x + u * kThreads;
        if (f >= d) break;
        if (first) held[u] = row[f];
        visit(f, &held[u]);
        if (last) row[f] = held[u];
      }
    } else {
      for (int64_t f = threadIdx.x; f < d; f += kThreads) {
        float element = row[f];
        visit(f, &element);
        if (!first) row[f] = element;
      }
    }
  }
};

// The same for a row of norm 1, by one block: g loses its part along the row, and the row gets norm
// 1 again. Bound by memory.
template <int kHeld>
__global__ void __launch_bounds__(kThreads) adam_unit_rows_kernel(Matrices m, Step s, int64_t d) {
  __shared__ float parts[kWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * d;
  RowElements<kHeld> elements{m.parameter + begin, d, {}};
  float length = 0, product = 0;
  elements.each(true, false, [&](int64_t f, const float* parameter) {
    length += *parameter * *parameter;
    product += *parameter * m.grad[begin + f];
  });
  length = block_sum(length, parts);
  product = block_sum(product, parts);
  const float along = length > 0 ? product / length : 0;
  float moved = 0;
  elements.each(false, false, [&](int64_t f, float* parameter) {
    *parameter = step_element(m, s, begin + f, *parameter, s.weight_decay - along);
    moved += *parameter * *parameter;
  });
  moved = block_sum(moved, parts);
  const float scale = moved > 0 ? 1 / sqrtf(moved) : 1;
  elements.each(false, true, [&](int64_t, float* parameter) { *parameter *= scale; });
}

}  // namespace

void adam_step(const AdamStepArguments& call, cudaStream_t stream) {
  const Matrices matrices{call.parameter, call.grad, call.mean, call.square};
  const Step step{call.step_size,  call.new_mean, call.beta2,       call.new_square,
                  call.root_scale, call.eps,      call.weight_decay};
  const int64_t count = call.rows * call.d;
  if (count == 0) return;
  if (call.unit_rows) {
    const auto kernel = call.d <= 4 * kThreads           ? adam_unit_rows_kernel<4>
                        : call.d <= kMostHeld * kThreads ? adam_unit_rows_kernel<kMostHeld>
                                                         : adam_unit_rows_kernel<0>;
    launch(kernel, static_cast<unsigned>(call.rows), kThreads, 0, stream, matrices, step, call.d);
    return;
  }
  const int64_t per_block = kThreads * kPerThread;
  const int64_t blocks = (count + per_block - 1) / per_block;
  launch(adam_step_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, matrices, step,
         count);
}

}  // namespace sparsekern::cuda
