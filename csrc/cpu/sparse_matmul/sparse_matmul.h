// Sparse codes times a dense dictionary, the transposition of codes, and the gradients.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
//
// dtype tags: 0 float32, 1 bfloat16, 2 float16, 3 float64; index tags: 0 int64, 1 int32.
// A weight element (i, f) lies at i * stride_n + f * stride_d; one of the strides is 1.
// An int64_t result is -1, or the flat position of the first index outside 0..n-1; in that case
// the outputs are not to be used.
#include <cstdint>

namespace sparsekern::cpu::SPARSEKERN_ISA {

// out[b, :] = bias + sum over j of values[b, j] * weight[indices[b, j], :], summed in float32.
int64_t sparse_matmul(const void* values,   // [rows, k]
                      int dtype,            //
                      const void* indices,  // [rows, k]
                      int index_tag, int64_t rows, int64_t k,
                      const void* weight,  // [n, d]
                      int weight_dtype, int64_t n, int64_t d, int64_t weight_stride_n,
                      int64_t weight_stride_d,
                      const void* bias,  // null or [d] of weight_dtype
                      void* out,         // [rows, d] of dtype
                      int threads);

// Lists the flat positions 0..count-1 grouped by latent, ascending inside a latent.
int64_t transpose_codes(const void* indices,  // [count]
                        int index_tag, int64_t count, int64_t n,
                        int64_t* offsets,    // [n + 1]
                        int32_t* positions,  // [count]
                        int threads);

// Whether offsets and positions are what transpose_codes makes of these indices. n < 2^31.
bool is_transposition(const void* indices,  // [count]
                      int index_tag, int64_t count, int64_t n,
                      const int64_t* offsets,    // [n + 1]
                      const int32_t* positions,  // [count]
                      int threads);

// grad_values[b, j] = grad[b, :] . weight[indices[b, j], :]
// grad_weight[i, :] = sum over the entries e = (b, j) of latent i of values[e] * grad[b, :]
// offsets and positions come from transpose_codes; where somebody else had them meanwhile,
// `indices` is given, and they are checked: false when they are not its transposition, and nothing
// was written. The bits do not depend on `threads`.
bool sparse_matmul_backward(const void* grad,  // [rows, d] of dtype
                            int dtype,
                            const void* values,  // [rows, k]
                            int64_t rows, int64_t k,
                            const void* weight,  // [n, d]
                            int weight_dtype, int64_t n, int64_t d, int64_t weight_stride_n,
                            int64_t weight_stride_d,
                            const int64_t* offsets,    // [n + 1]
                            const int32_t* positions,  // [rows * k]
                            const void* indices,       // null or [rows, k]
                            int index_tag,
                            void* grad_values,  // null or [rows, k] of dtype
                            void* grad_weight,  // null or [n, d] of weight_dtype
                            int64_t grad_weight_stride_n, int64_t grad_weight_stride_d,
                            int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
