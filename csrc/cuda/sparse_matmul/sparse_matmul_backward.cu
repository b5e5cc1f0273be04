// Backward: both gradients in one pass over the latents. Latents with many entries:
// backward_hot.cuh.
#include "cuda/common/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/sparse_matmul/backward_columns.cuh"
#include "cuda/sparse_matmul/backward_hot.cuh"
#include "cuda/sparse_matmul/backward_rows.cuh"

namespace sparsekern::cuda {

namespace {

// Whether the dictionary or its gradient has features that do not lie side by side.
bool column_major(const Matrix& weight, const Matrix& gradient) {
  const bool sums = gradient.data != nullptr;
  return weight.columns > 1 && (weight.column_stride != 1 || (sums && gradient.column_stride != 1));
}

template <class Values, class Weight>
void differentiate(const Gradients<Values, Weight>& p, bool columns, float* dots, int64_t count,
                   cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Values));
  const bool vector_grad = packs_fit<kCount>(p.grad, p.d, p.d);
  const bool vector_rows = packs_fit<kCount>(p.weight, p.stride_n, p.d) &&
                           packs_fit<kCount>(p.grad_weight, p.grad_stride_n, p.d);
  if (columns && vector_grad) {
    differentiate_columns<true>(p, stream);
  } else if (columns) {
    differentiate_columns<false>(p, stream);
  } else if (vector_grad && vector_rows) {
    differentiate_rows<true>(p, dots, count, stream);
  } else {
    differentiate_rows<false>(p, dots, count, stream);
  }
  if (count > p.hot_entries) differentiate_hot(p, count, stream);
}

}  // namespace

int64_t sparse_matmul_backward_workspace(const SparseMatmulBackwardArguments& call) {
  const int64_t parts = parts_of(call.weight.columns);
  if (call.grad_values == nullptr || parts == 1) return 0;
  if (column_major(call.weight, call.grad_weight)) return 0;
  return parts * call.codes.count() * static_cast<int64_t>(sizeof(float));
}

void sparse_matmul_backward(const SparseMatmulBackwardArguments& call, void* workspace,
                            cudaStream_t stream) {
  const Codes& codes = call.codes;
  const Matrix &matrix = call.weight, &gradient = call.grad_weight;
  visit_dtypes("sparse_matmul_backward", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
    using Values = decltype(value);
    using Weight = decltype(weight);
    const int64_t count = codes.count();
    if (call.grad_values != nullptr && count > 0) {
      // For codes that are in no list.
      const size_t bytes = static_cast<size_t>(count) * sizeof(Values);
      check(cudaMemsetAsync(call.grad_values, 0, bytes, stream),
            "sparse_matmul_backward: cudaMemsetAsync");
    }
    const bool wanted = call.grad_values != nullptr || gradient.data != nullptr;
    if (!wanted || matrix.rows == 0 || matrix.columns == 0) return;
    const Gradients<Values, Weight> p{
        static_cast<const Values*>(call.grad),
        static_cast<const Values*>(codes.values),
        codes.k,
        static_cast<const Weight*>(matrix.data),
        matrix.rows,
        matrix.columns,
        matrix.row_stride,
        matrix.column_stride,
        call.offsets,
        call.positions,
        static_cast<Values*>(call.grad_values),
        static_cast<Weight*>(gradient.data),
        gradient.row_stride,
        gradient.column_stride,
        count / kHotPart < kHotEntries ? kHotEntries : count / kHotPart,
    };
    differentiate(p, column_major(matrix, gradient), static_cast<float*>(workspace), count, stream);
  });
}

}  // namespace sparsekern::cuda
