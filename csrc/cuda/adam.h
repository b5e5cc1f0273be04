// One step of Adam, and of Adam on rows of norm 1, on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// With g the gradient, to which weight_decay * parameter is added:
//   mean   = beta1 * mean + (1 - beta1) * g
//   square = beta2 * square + (1 - beta2) * g^2
//   parameter -= step_size * mean / (sqrt(square) * root_scale + eps)
// unit_rows: before that, g loses its part along the parameter's row; afterwards the row gets norm
// 1.
void adam_step(float* parameter,   // [rows, d]
               const float* grad,  // [rows, d]
               float* mean,        // [rows, d]
               float* square,      // [rows, d]
               int64_t rows, int64_t d, float step_size, float beta1, float beta2, float root_scale,
               float eps, float weight_decay, bool unit_rows, cudaStream_t stream);

}  // namespace sparsekern::cuda
