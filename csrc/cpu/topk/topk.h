// The k largest of each row, as codes or as a masked dense row.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
//
// Order: value, largest first (NaN before +inf, -0 equal to +0), then index, smallest first.
// dtype tags: 0 float32, 1 bfloat16, 2 float16, 3 float64.
#include <cstdint>

#ifndef SPARSEKERN_TOPK_FLAGS
#define SPARSEKERN_TOPK_FLAGS
namespace sparsekern::cpu {
constexpr int kSorted = 1;  // largest first; otherwise by ascending index
constexpr int kRelu = 2;    // selected values <= 0 become 0
constexpr int kAbs = 4;     // order by magnitude
}  // namespace sparsekern::cpu
#endif

namespace sparsekern::cpu::SPARSEKERN_ISA {

void topk(const void* x,  // [rows, n]
          int dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride, int64_t k,
          int flags,
          void* values,      // [rows, k] of dtype
          int64_t* indices,  // [rows, k]
          void* masked,      // null or [rows, n] of dtype
          int64_t* counts,   // null or [n], zeroed by the caller
          int threads);

// dense[b, indices[b, j]] = values[b, j], zero elsewhere. Indices are unique within a row.
void codes_to_dense(const void* values, int dtype,
                    const int64_t* indices,  // [rows, k]
                    int64_t rows, int64_t k, int64_t n,
                    void* dense,  // [rows, n] of dtype
                    int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
