// The k largest scores of few rows against plain loops and a sort. Inputs are multiples of 1/8
// between -2 and 2, so that sums are exact and full of ties.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/cpu/driver.h"

namespace sparsekern::cpu {

namespace {

struct Shape {
  int64_t rows, d, n, k;
};

std::vector<float> eighths(int64_t count, std::mt19937& random) {
  std::vector<float> numbers(static_cast<size_t>(count));
  for (float& x : numbers) x = static_cast<float>(static_cast<int>(random() % 33) - 16) / 8;
  return numbers;
}

bool check_codes(const Kernels& kernels, const Shape& shape, int64_t gap, int flags,
                 std::mt19937& random) {
  const auto [rows, d, n, k] = shape;
  const int64_t x_stride = d + gap, stride = d + 2 * gap;
  const bool sorted = (flags & 1) != 0, relu = (flags & 2) != 0;
  const bool has_bias = (flags & 4) != 0, has_scale = (flags & 8) != 0;
  std::vector<float> x = eighths((rows - 1) * x_stride + d, random);
  std::vector<float> weight = eighths((n - 1) * stride + d, random);
  const std::vector<float> bias = eighths(n, random), scale = eighths(n, random);
  std::vector<float> values(rows * k);
  std::vector<int64_t> indices(rows * k);
  kernels.linear_topk({{x.data(), kFloat32, rows, d, x_stride, 1},
                       {weight.data(), kFloat32, n, d, stride, 1},
                       has_bias ? bias.data() : nullptr,
                       has_scale ? scale.data() : nullptr,
                       k,
                       sorted,
                       relu,
                       values.data(),
                       indices.data()},
                      1 + static_cast<int>(random() % 3));
  bool right = true;
  for (int64_t b = 0; b < rows; ++b) {
    std::vector<double> scores(n);
    std::vector<int64_t> order(n);
    for (int64_t i = 0; i < n; ++i) {
      double score = 0;
      for (int64_t f = 0; f < d; ++f) {
        score += static_cast<double>(x[b * x_stride + f]) * weight[i * stride + f];
      }
      if (has_bias) score += bias[i];
      if (has_scale) score *= scale[i];
      scores[i] = score;
      order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t p, int64_t q) { return scores[p] > scores[q]; });
    if (!sorted) std::sort(order.begin(), order.begin() + k);
    for (int64_t j = 0; j < k; ++j) {
      const double score = scores[order[j]];
      right &= indices[b * k + j] == order[j];
      right &= values[b * k + j] == static_cast<float>(relu && score < 0 ? 0 : score);
    }
  }
  return right;
}

int check_linear_topk(const Kernels& kernels, Cases* cases) {
  // around vectors, tiles, blocks and their rests
  const Shape shapes[] = {{1, 1, 1, 1},     {1, 16, 16, 3},   {2, 17, 33, 33}, {3, 31, 50, 7},
                          {4, 8, 15, 15},   {5, 40, 100, 10}, {6, 3, 47, 1},   {7, 64, 64, 12},
                          {8, 100, 130, 9}, {13, 5, 31, 4},   {33, 20, 70, 6}, {1, 129, 700, 32}};
  std::mt19937 random(31);
  int mismatches = 0;
  for (const Shape& shape : shapes) {
    for (int flags = 0; flags < 16; ++flags) {
      const int64_t gap = static_cast<int64_t>(random() % 3);
      ++(*cases)["linear_topk"];
      if (check_codes(kernels, shape, gap, flags, random)) continue;
      ++mismatches;
      std::printf("MISMATCH linear_topk: rows %ld d %ld n %ld k %ld gap %ld flags %d\n",
                  static_cast<long>(shape.rows), static_cast<long>(shape.d),
                  static_cast<long>(shape.n), static_cast<long>(shape.k), static_cast<long>(gap),
                  flags);
    }
  }
  return mismatches;
}

const Checks kChecks(check_linear_topk);

}  // namespace

}  // namespace sparsekern::cpu
