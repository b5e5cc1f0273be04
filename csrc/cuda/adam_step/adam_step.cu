// One step of Adam, and of Adam on rows of norm 1.
#include "cuda/common/warp.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Elements of a thread where rows do not matter: enough loads under way, few blocks.
constexpr int64_t kPerThread = 8;

struct Matrices {
  float* parameter;   // [rows, d]
  const float* grad;  // [rows, d]
  float* mean;        // [rows, d]
  float* square;      // [rows, d]
};

struct Step {
  float step_size, new_mean, beta2, new_square, root_scale, eps, weight_decay;
};

// The new parameter; mean and square become new, too.
__device__ inline float step_element(const Step& s, float parameter, float grad, float decay,
                                     float* mean, float* square) {
  const float g = grad + decay * parameter;
  *mean += s.new_mean * (g - *mean);
  *square = s.beta2 * *square + s.new_square * g * g;
  return parameter - s.step_size * *mean / (sqrtf(*square) * s.root_scale + s.eps);
}

__device__ inline float step_in_memory(const Matrices& m, const Step& s, int64_t i, float decay) {
  float mean = m.mean[i], square = m.square[i];
  const float parameter = step_element(s, m.parameter[i], m.grad[i], decay, &mean, &square);
  m.mean[i] = mean;
  m.square[i] = square;
  return parameter;
}

// parameter -= step_size * mean / (sqrt(square) * root_scale + eps), element by element. Neighbours
// in a warp take neighbours in memory. Bound by memory: 28 bytes an element.
__global__ void __launch_bounds__(kThreads) adam_step_kernel(Matrices m, Step s, int64_t count) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread + threadIdx.x;
  for (int64_t u = 0; u < kPerThread; ++u) {
    const int64_t i = first + u * kThreads;
    if (i < count) m.parameter[i] = step_in_memory(m, s, i, s.weight_decay);
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

// The factor of a row with these squares that gives it norm 1.
__device__ inline float unit_scale(float squares) { return squares > 0 ? 1 / sqrtf(squares) : 1; }

// The same for a row of norm 1, by one block: g loses its part along the row, and the row gets norm
// 1 again. The block holds the row in registers, kHeld elements a thread; so memory sees everything
// once. All loads of a pass are independent. Bound by memory.
template <int kHeld>
__global__ void __launch_bounds__(kThreads) adam_unit_rows_kernel(Matrices m, Step s, int64_t d) {
  __shared__ float parts[kWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * d + threadIdx.x;
  const int left = static_cast<int>(d) - static_cast<int>(threadIdx.x);
  float parameter[kHeld], grad[kHeld];
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    parameter[u] = u * kThreads < left ? m.parameter[begin + u * kThreads] : 0.0f;
    grad[u] = u * kThreads < left ? m.grad[begin + u * kThreads] : 0.0f;
  }
  float length = 0, product = 0;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    length += parameter[u] * parameter[u];
    product += parameter[u] * grad[u];
  }
  length = block_sum(length, parts);
  product = block_sum(product, parts);
  const float along = length > 0 ? product / length : 0;
  constexpr int kAtOnce = kHeld < 8 ? kHeld : 8;
  float moved = 0;
#pragma unroll
  for (int first = 0; first < kHeld; first += kAtOnce) {
    float mean[kAtOnce], square[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = (first + u) * kThreads;
      mean[u] = at < left ? m.mean[begin + at] : 0.0f;
      square[u] = at < left ? m.square[begin + at] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = (first + u) * kThreads;
      if (at >= left) continue;
      float* element = &parameter[first + u];
      *element =
          step_element(s, *element, grad[first + u], s.weight_decay - along, &mean[u], &square[u]);
      moved += *element * *element;
      m.mean[begin + at] = mean[u];
      m.square[begin + at] = square[u];
    }
  }
  const float scale = unit_scale(block_sum(moved, parts));
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (u * kThreads < left) m.parameter[begin + u * kThreads] = parameter[u] * scale;
  }
}

// The same for rows of any length: the second and third passes find the row in a cache.
__global__ void __launch_bounds__(kThreads) adam_long_rows_kernel(Matrices m, Step s, int64_t d) {
  __shared__ float parts[kWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * d;
  float length = 0, product = 0;
  for (int64_t i = begin + threadIdx.x; i < begin + d; i += kThreads) {
    length += m.parameter[i] * m.parameter[i];
    product += m.parameter[i] * m.grad[i];
  }
  length = block_sum(length, parts);
  product = block_sum(product, parts);
  const float along = length > 0 ? product / length : 0;
  float moved = 0;
  for (int64_t i = begin + threadIdx.x; i < begin + d; i += kThreads) {
    const float parameter = step_in_memory(m, s, i, s.weight_decay - along);
    m.parameter[i] = parameter;
    moved += parameter * parameter;
  }
  const float scale = unit_scale(block_sum(moved, parts));
  for (int64_t i = begin + threadIdx.x; i < begin + d; i += kThreads) m.parameter[i] *= scale;
}

}  // namespace

void adam_step(const AdamStepArguments& call, cudaStream_t stream) {
  const Matrices matrices{call.parameter, call.grad, call.mean, call.square};
  const Step step{call.step_size,  call.new_mean, call.beta2,       call.new_square,
                  call.root_scale, call.eps,      call.weight_decay};
  const int64_t count = call.rows * call.d;
  if (count == 0) return;
  if (call.unit_rows) {
    const auto kernel = call.d <= 4 * kThreads    ? adam_unit_rows_kernel<4>
                        : call.d <= 16 * kThreads ? adam_unit_rows_kernel<16>
                                                  : adam_long_rows_kernel;
    launch(kernel, static_cast<unsigned>(call.rows), kThreads, 0, stream, matrices, step, call.d);
    return;
  }
  const int64_t per_block = kThreads * kPerThread;
  const int64_t blocks = (count + per_block - 1) / per_block;
  launch(adam_step_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, matrices, step,
         count);
}

}  // namespace sparsekern::cuda
