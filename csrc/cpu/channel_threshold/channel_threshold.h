// Thresholds per channel, and what exceeds them.
//
// Included once per instruction set with SPARSEKERN_ISA defined (baseline, avx2, avx512), hence no
// include guard: a repeated declaration is harmless.
#include <cstdint>

namespace sparsekern::cpu::SPARSEKERN_ISA {

// out[c] = the rank-th smallest of x[:, c, :], counted from 1; NaN above +inf, -0 as +0.
void channel_threshold(const void* x,  // [outer, channels, inner] of dtype
                       int dtype, int64_t outer, int64_t channels, int64_t inner,
                       int64_t rank,  // 1..outer * inner
                       void* out,     // [channels] of dtype
                       int threads);

// y = z - t where not z <= t, else 0, with z = x * scale + shift, or x. counts[c] += how many.
// The numbers per channel are float, or double with a dtype of double.
void threshold_relu(const void* x,  // [outer, channels, inner] of dtype
                    int dtype, int64_t outer, int64_t channels, int64_t inner,
                    const void* threshold,  // [channels]
                    const void* scale,      // null or [channels]
                    const void* shift,      // null with scale, or [channels]
                    void* y,                // like x
                    int64_t* counts,        // [channels], zeroed by the caller
                    int threads);

// The elements of y that are not zeroed, in the order of x, and their places in x. counts are
// right in any case; values and indices are written if no more than `capacity` were found.
void threshold_codes(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                     const void* threshold, const void* scale, const void* shift, int64_t capacity,
                     void* values,      // [capacity] of dtype
                     int64_t* indices,  // [capacity]
                     int64_t* counts,   // [channels], zeroed by the caller
                     int threads);

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
