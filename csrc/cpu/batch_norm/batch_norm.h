// Batch normalisation in training mode, and its gradient.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
#include <cstdint>

namespace sparsekern::cpu::SPARSEKERN_ISA {

// z = (x - mean) / sqrt(var + eps) * weight + bias, with the mean and the (biased) variance of each
// channel over outer and inner. Numbers per channel are float, or double with a dtype of double.
// The same bits for any number of threads.
void batch_norm(const void* x,  // [outer, channels, inner] of dtype, not empty
                int dtype, int64_t outer, int64_t channels, int64_t inner,
                const void* weight,  // null (ones) or [channels]
                const void* bias,    // null (zeros) or [channels]
                double eps,
                void* z,     // like x
                void* mean,  // [channels]
                void* var,   // [channels]
                int threads);

// Gradients of x, weight and bias, given that of z.
void batch_norm_backward(const void* grad, const void* x, int dtype, int64_t outer,
                         int64_t channels, int64_t inner, const void* weight, const void* mean,
                         const void* var, double eps,
                         void* grad_x,       // like x
                         void* grad_weight,  // [channels]
                         void* grad_bias,    // [channels]
                         int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
