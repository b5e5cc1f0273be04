// One step of Adam, and of Adam on rows of norm 1.
#include <algorithm>
#include <cmath>

#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// Elements of a matrix whose rows do not matter that one piece of work takes.
constexpr int64_t kPiece = 4096;
constexpr double kNanosecondsPerElement = 0.5;

// sum_i a[i] * b[i], in an order that depends on d alone.
inline float dot(const float* a, const float* b, int64_t d) {
  FloatLanes even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kFloatLanes <= d; i += 2 * kFloatLanes) {
    even = multiply_add(load(a + i), load(b + i), even);
    odd = multiply_add(load(a + i + kFloatLanes), load(b + i + kFloatLanes), odd);
  }
  for (; i < d; i += kFloatLanes) {
    const int64_t left = std::min<int64_t>(d - i, kFloatLanes);
    even = multiply_add(load_partial(a + i, left), load_partial(b + i, left), even);
  }
  return sum_lanes(even + odd);
}

// The compiler makes vectors of this loop: four streams in, three out, one square root and one
// division an element. Bound by memory once the matrices leave the caches.
inline void step_elements(const AdamStepArguments& s, float* __restrict parameter,
                          const float* __restrict grad, float* __restrict mean,
                          float* __restrict square, int64_t d, float along) {
  const float decay = s.weight_decay - along;
  for (int64_t i = 0; i < d; ++i) {
    const float g = grad[i] + decay * parameter[i];
    const float m = mean[i] + s.new_mean * (g - mean[i]);
    const float v = s.beta2 * square[i] + s.new_square * g * g;
    mean[i] = m;
    square[i] = v;
    parameter[i] -= s.step_size * m / (std::sqrt(v) * s.root_scale + s.eps);
  }
}

// A row lies in the L1 cache between the three passes over it.
inline void step_unit_row(const AdamStepArguments& s, float* parameter, const float* grad,
                          float* mean, float* square, int64_t d) {
  const float length = dot(parameter, parameter, d);
  const float along = length > 0 ? dot(grad, parameter, d) / length : 0;
  step_elements(s, parameter, grad, mean, square, d, along);
  const float norm = std::sqrt(dot(parameter, parameter, d));
  const float scale = norm > 0 ? 1 / norm : 1;
  for (int64_t i = 0; i < d; ++i) parameter[i] *= scale;
}

}  // namespace

void adam_step(const AdamStepArguments& call, int threads) {
  const int64_t d = call.d, total = call.rows * d;
  const int team = useful_threads(threads, kNanosecondsPerElement * static_cast<double>(total));
  if (call.unit_rows) {
    share_out(team, call.rows, [&](int64_t row) {
      const int64_t at = row * d;
      step_unit_row(call, call.parameter + at, call.grad + at, call.mean + at, call.square + at, d);
    });
    return;
  }
  share_out(team, (total + kPiece - 1) / kPiece, [&](int64_t piece) {
    const int64_t at = piece * kPiece;
    const int64_t count = std::min(kPiece, total - at);
    step_elements(call, call.parameter + at, call.grad + at, call.mean + at, call.square + at,
                  count, 0);
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
