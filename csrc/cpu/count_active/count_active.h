// How often each latent fired.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
#include <cstdint>

namespace sparsekern::cpu::SPARSEKERN_ISA {

// counts[i] += how many entries have index i (and a value that is not 0, when values are given).
// Returns -1, or the position of the first index outside 0..n-1; then nothing was written.
int64_t count_active(const void* indices,  // [count]
                     int index_tag, int64_t count,
                     const void* values,  // null or [count] of dtype
                     int dtype, int64_t n,
                     int64_t* counts,  // [n], zeroed by the caller
                     int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
