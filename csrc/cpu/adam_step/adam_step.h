// One step of Adam, and of Adam on rows of norm 1.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
#include <cstdint>

namespace sparsekern::cpu::SPARSEKERN_ISA {

// With g the gradient, to which weight_decay * parameter is added:
//   mean  += new_mean * (g - mean)                 new_mean = 1 - beta1
//   square = beta2 * square + new_square * g^2     new_square = 1 - beta2, rounded once
//   parameter -= step_size * mean / (sqrt(square) * root_scale + eps)
// unit_rows: before that, g loses its part along the parameter's row; afterwards the row gets norm
// 1.
void adam_step(float* parameter,   // [rows, d]
               const float* grad,  // [rows, d]
               float* mean,        // [rows, d]
               float* square,      // [rows, d]
               int64_t rows, int64_t d, float step_size, float new_mean, float beta2,
               float new_square, float root_scale, float eps, float weight_decay, bool unit_rows,
               int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
