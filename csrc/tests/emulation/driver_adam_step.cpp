// The Adam step of the CUDA kernels against its definition in double.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/kernels.h"
#include "tests/emulation/driver.h"

namespace {

constexpr float kStepSize = 0.02f, kBeta1 = 0.9f, kBeta2 = 0.99f, kRootScale = 1.5f, kEps = 1e-6f;
constexpr float kDecay = 0.1f;

bool check_case(int64_t rows, int64_t d, bool unit, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const size_t count = static_cast<size_t>(rows * d);
  std::vector<float> parameter(count), grad(count), mean(count), square(count);
  for (size_t i = 0; i < count; ++i) {
    parameter[i] = i < static_cast<size_t>(d) ? 0.0f : normal(random);  // the first row is zero
    grad[i] = normal(random);
    mean[i] = normal(random);
    square[i] = std::abs(normal(random));
  }
  std::vector<double> truth(parameter.begin(), parameter.end());
  for (int64_t row = 0; row < rows; ++row) {
    double length = 0, product = 0, moved = 0;
    for (int64_t i = row * d; i < (row + 1) * d; ++i) {
      length += truth[i] * truth[i];
      product += truth[i] * grad[i];
    }
    const double along = unit && length > 0 ? product / length : 0;
    for (int64_t i = row * d; i < (row + 1) * d; ++i) {
      const double g = grad[i] + (double{kDecay} - along) * truth[i];
      const double m = mean[i] + (1 - double{kBeta1}) * (g - mean[i]);
      const double v = double{kBeta2} * square[i] + (1 - double{kBeta2}) * g * g;
      truth[i] -= double{kStepSize} * m / (std::sqrt(v) * double{kRootScale} + double{kEps});
      moved += truth[i] * truth[i];
    }
    for (int64_t i = row * d; unit && moved > 0 && i < (row + 1) * d; ++i) {
      truth[i] /= std::sqrt(moved);
    }
  }
  sparsekern::cuda::adam_step(
      {parameter.data(), grad.data(), mean.data(), square.data(), rows, d, kStepSize, 1 - kBeta1,
       kBeta2, 1 - kBeta2, kRootScale, kEps, kDecay, unit},
      nullptr);
  for (size_t i = 0; i < count; ++i) {
    if (!(std::abs(parameter[i] - truth[i]) <= 1e-5 * (1 + std::abs(truth[i])))) return false;
  }
  return true;
}

int check_adam(int* cases) {
  std::mt19937 random(5);
  int failures = 0;
  for (const int64_t d : {1, 31, 256, 257, 1025, 4096, 4100}) {
    for (const bool unit : {false, true}) {
      ++*cases;
      if (check_case(3, d, unit, random)) continue;
      ++failures;
      std::printf("adam_step: rows 3 d %d unit %d is wrong\n", int(d), unit);
    }
  }
  return failures;
}

const sparsekern::emulation::Checks kChecks("adam_step", check_adam);

}  // namespace
