// The Adam step against its definition in double: a few float32 roundings apart.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/cpu/driver.h"

namespace sparsekern::cpu {

namespace {

constexpr float kStepSize = 0.02f, kBeta1 = 0.9f, kBeta2 = 0.99f, kRootScale = 1.5f, kEps = 1e-6f;

struct Matrices {
  std::vector<float> parameter, grad, mean, square;
};

// One row of the definition, in double.
void step_row(std::vector<double>& parameter, const std::vector<double>& grad,
              std::vector<double>& mean, std::vector<double>& square, float decay, bool unit) {
  double length = 0, product = 0, moved = 0;
  const size_t d = parameter.size();
  for (size_t i = 0; i < d; ++i) {
    length += parameter[i] * parameter[i];
    product += parameter[i] * grad[i];
  }
  const double along = unit && length > 0 ? product / length : 0;
  for (size_t i = 0; i < d; ++i) {
    const double g = grad[i] + (static_cast<double>(decay) - along) * parameter[i];
    mean[i] += (1 - static_cast<double>(kBeta1)) * (g - mean[i]);
    square[i] = static_cast<double>(kBeta2) * square[i] + (1 - static_cast<double>(kBeta2)) * g * g;
    parameter[i] -= static_cast<double>(kStepSize) * mean[i] /
                    (std::sqrt(square[i]) * static_cast<double>(kRootScale) + kEps);
    moved += parameter[i] * parameter[i];
  }
  if (!unit || moved <= 0) return;
  for (double& x : parameter) x /= std::sqrt(moved);
}

bool near(const std::vector<float>& actual, int64_t at, const std::vector<double>& truth) {
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[at + i]) - truth[i]);
    if (!(error <= 1e-5 * (1 + std::abs(truth[i])))) return false;
  }
  return true;
}

bool check_case(const Kernels& kernels, int64_t rows, int64_t d, float decay, bool unit,
                std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  Matrices m;
  for (int64_t i = 0; i < rows * d; ++i) {
    m.parameter.push_back(i < d ? 0.0f : normal(random));  // the first row is zero
    m.grad.push_back(normal(random));
    m.mean.push_back(normal(random));
    m.square.push_back(std::abs(normal(random)));
  }
  const Matrices before = m;
  kernels.adam_step({m.parameter.data(), m.grad.data(), m.mean.data(), m.square.data(), rows, d,
                     kStepSize, 1 - kBeta1, kBeta2, 1 - kBeta2, kRootScale, kEps, decay, unit},
                    1 + static_cast<int>(random() % 3));
  const auto row_of = [&](const std::vector<float>& x, int64_t row) {
    return std::vector<double>(x.begin() + row * d, x.begin() + (row + 1) * d);
  };
  bool right = m.grad == before.grad;
  for (int64_t row = 0; row < rows; ++row) {
    auto parameter = row_of(before.parameter, row), mean = row_of(before.mean, row);
    auto square = row_of(before.square, row);
    step_row(parameter, row_of(before.grad, row), mean, square, decay, unit);
    right &= near(m.parameter, row * d, parameter) && near(m.mean, row * d, mean) &&
             near(m.square, row * d, square);
  }
  return right;
}

int check_adam(const Kernels& kernels, Cases* cases) {
  std::mt19937_64 random(11);
  int mismatches = 0;
  for (const int64_t rows : {1, 2, 5, 60}) {
    for (const int64_t d : {1, 7, 16, 33, 96, 700, 4099}) {
      for (const bool unit : {false, true}) {
        const float decay = random() % 2 == 0 ? 0.0f : 0.1f;
        ++(*cases)["adam_step"];
        if (check_case(kernels, rows, d, decay, unit, random)) continue;
        ++mismatches;
        std::printf("MISMATCH adam_step: rows %ld d %ld decay %g unit %d\n",
                    static_cast<long>(rows), static_cast<long>(d), static_cast<double>(decay),
                    unit);
      }
    }
  }
  return mismatches;
}

const Checks kChecks(check_adam);

}  // namespace

}  // namespace sparsekern::cpu
