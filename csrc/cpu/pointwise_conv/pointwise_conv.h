// The 1x1 convolution of a tensor given by its elements that are not zero.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
#include <cstdint>

namespace sparsekern::cpu::SPARSEKERN_ISA {

// out[o, e, s] = bias[e] + the sum, over codes m at outer o and inner s, of
//                values[m] * weight[e, channel of m]
void pointwise_conv(const void* values,  // [count] of dtype
                    int dtype,
                    const void* indices,  // [count] into [outer, channels, inner]
                    int index_tag, int64_t count, int64_t outer, int64_t channels, int64_t inner,
                    const void* weight,  // [outputs, channels] of weight_dtype
                    int weight_dtype, int64_t outputs, int64_t stride_output,
                    int64_t stride_channel,
                    const void* bias,  // null or [outputs] of weight_dtype
                    void* out,         // [outer, outputs, inner] of dtype
                    int threads);

// The gradients of all inputs, given grad [outer, outputs, inner] of dtype.
void pointwise_conv_backward(const void* grad, int dtype, const void* values, const void* indices,
                             int index_tag, int64_t count, int64_t outer, int64_t channels,
                             int64_t inner, const void* weight, int weight_dtype, int64_t outputs,
                             int64_t stride_output, int64_t stride_channel,
                             void* grad_values,  // [count] of dtype
                             void* grad_weight,  // [outputs, channels] of weight_dtype
                             void* grad_bias,    // [outputs] of weight_dtype
                             int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
