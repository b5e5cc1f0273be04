// The operands of the sparse products, as the kernels take them, and the limits of a grid.
#pragma once

#include <cstdint>

#include "cuda/common/indices.cuh"
#include "cuda/common/packs.cuh"
#include "cuda/common/warp.cuh"

namespace sparsekern::cuda {

constexpr int64_t kMostSlowBlocks = 65535;  // gridDim.y

// The operands of one forward product.
template <class Values, class Weight>
struct Product {
  const Values* values;  // [rows, k]
  Indices indices;       // [rows, k]
  int64_t rows, k;
  const Weight* weight;  // [n, d]
  int64_t n, d, stride_n, stride_d;
  const Weight* bias;  // null or [d]
  Values* out;         // [rows, d]
};

// The operands of one backward pass.
template <class Values, class Weight>
struct Gradients {
  const Values* grad;    // [rows, d]
  const Values* values;  // [rows, k]
  int64_t k;
  const Weight* weight;  // [n, d]
  int64_t n, d, stride_n, stride_d;
  const int64_t* offsets;    // [n + 1]
  const int32_t* positions;  // [rows * k]
  Values* grad_values;       // null or [rows, k]
  Weight* grad_weight;       // null or [n, d]
  int64_t grad_stride_n, grad_stride_d;
  int64_t hot_entries;  // latents with more are left to backward_hot.cuh

  // The row of the codes that a flat position lies in. k is below 2^31, and a division of 64 bits
  // takes several times as long.
  __device__ int64_t row_of(int position) const { return position / static_cast<int>(k); }
};

}  // namespace sparsekern::cuda
