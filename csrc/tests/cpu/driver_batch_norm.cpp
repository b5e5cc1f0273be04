// Batch normalisation and its gradient against their definition in long double.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/cpu/driver.h"

namespace sparsekern::cpu {

namespace {

constexpr double kEps = 1e-3;

struct Case {
  int64_t outer, channels, inner;
  int threads;
  int64_t total() const { return outer * channels * inner; }
  size_t channel(int64_t i) const { return static_cast<size_t>(i / inner % channels); }
};

// Rows that fill vectors evenly and rows that do not, one channel, long runs, several pieces of a
// run and several parts.
const Case kCases[] = {{2, 1, 1, 1},     {7, 3, 1, 2},    {50, 10, 1, 3},   {9, 17, 1, 2},
                       {3, 4, 7, 2},     {2, 5, 63, 2},   {3, 2, 64, 1},    {2, 3, 700, 3},
                       {40, 130, 1, 2},  {5, 1300, 1, 1}, {4, 3, 20001, 3}, {5000, 10, 1, 3},
                       {3, 1, 40000, 2}, {900, 40, 3, 2}};

template <class T>
using Numbers = std::vector<T>;

// What a case puts in, and what the definition makes of it.
template <class T>
struct Batch {
  Numbers<T> x, grad, weight, bias;
  Numbers<long double> z, mean, var, grad_x, grad_weight, grad_bias;
};

template <class T>
Batch<T> make(const Case& shape, bool affine, std::mt19937_64& random) {
  std::normal_distribution<T> normal;
  Batch<T> b;
  const size_t channels = static_cast<size_t>(shape.channels);
  for (int64_t i = 0; i < shape.total(); ++i) {
    b.x.push_back(normal(random) * 2 + static_cast<T>(shape.channel(i) % 5));
    b.grad.push_back(normal(random));
  }
  for (size_t c = 0; c < channels && affine; ++c) {
    b.weight.push_back(normal(random));
    b.bias.push_back(normal(random));
  }
  const long double n = static_cast<long double>(shape.outer * shape.inner);
  b.mean.resize(channels), b.var.resize(channels);
  b.grad_weight.resize(channels), b.grad_bias.resize(channels);
  const auto each = [&](auto&& visit) {
    for (int64_t i = 0; i < shape.total(); ++i) visit(static_cast<size_t>(i), shape.channel(i));
  };
  each([&](size_t i, size_t c) { b.mean[c] += static_cast<long double>(b.x[i]) / n; });
  const auto away = [&](size_t i, size_t c) {
    return static_cast<long double>(b.x[i]) - b.mean[c];
  };
  each([&](size_t i, size_t c) { b.var[c] += away(i, c) * away(i, c) / n; });
  const auto root = [&](size_t c) {
    return 1 / std::sqrt(b.var[c] + static_cast<long double>(kEps));
  };
  const auto weight = [&](size_t c) {
    return affine ? static_cast<long double>(b.weight[c]) : 1.0L;
  };
  const auto bias = [&](size_t c) { return affine ? static_cast<long double>(b.bias[c]) : 0.0L; };
  each([&](size_t i, size_t c) {
    b.z.push_back(away(i, c) * root(c) * weight(c) + bias(c));
    b.grad_bias[c] += static_cast<long double>(b.grad[i]);
    b.grad_weight[c] += static_cast<long double>(b.grad[i]) * away(i, c) * root(c);
  });
  each([&](size_t i, size_t c) {
    const long double g = static_cast<long double>(b.grad[i]);
    const long double rest = b.grad_bias[c] / n + away(i, c) * root(c) * b.grad_weight[c] / n;
    b.grad_x.push_back(weight(c) * root(c) * (g - rest));
  });
  return b;
}

// Sums of n terms of either sign reach about the root of n, and so do the errors of their parts.
template <class T>
bool near(const Numbers<T>& actual, const Numbers<long double>& truth, double terms) {
  const double unit = sizeof(T) == sizeof(float) ? 1e-6 : 1e-14;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error =
        std::abs(static_cast<double>(static_cast<long double>(actual[i]) - truth[i]));
    const double scale = std::sqrt(terms) + std::abs(static_cast<double>(truth[i]));
    if (!(error <= 8 * unit * scale)) return false;
  }
  return actual.size() == truth.size();
}

template <class T>
bool check_case(const Kernels& kernels, const Case& shape, Dtype dtype, bool affine,
                std::mt19937_64& random) {
  Batch<T> b = make<T>(shape, affine, random);
  const T* weight = affine ? b.weight.data() : nullptr;
  const T* bias = affine ? b.bias.data() : nullptr;
  const size_t channels = static_cast<size_t>(shape.channels);
  Numbers<T> z(b.x.size(), -77), grad_x(b.x.size(), -77), mean(channels, -77), var(channels, -77);
  Numbers<T> grad_weight(channels, -77), grad_bias(channels, -77);
  const ChannelTensor x{b.x.data(), dtype, shape.outer, shape.channels, shape.inner};
  kernels.batch_norm({x, weight, bias, kEps, z.data(), mean.data(), var.data()}, shape.threads);
  kernels.batch_norm_backward({b.grad.data(), x, weight, mean.data(), var.data(), kEps,
                               grad_x.data(), grad_weight.data(), grad_bias.data()},
                              shape.threads);
  const double n = static_cast<double>(shape.outer * shape.inner);
  return near(z, b.z, 1) && near(mean, b.mean, 1) && near(var, b.var, 1) &&
         near(grad_x, b.grad_x, 1) && near(grad_weight, b.grad_weight, n) &&
         near(grad_bias, b.grad_bias, n);
}

int check_batch_norm(const Kernels& kernels, Cases* cases) {
  std::mt19937_64 random(17);
  int mismatches = 0;
  for (const Case& shape : kCases) {
    for (const bool affine : {false, true}) {
      (*cases)["batch_norm"] += 2;
      (*cases)["batch_norm_backward"] += 2;
      const int wrong = !check_case<float>(kernels, shape, kFloat32, affine, random) +
                        !check_case<double>(kernels, shape, kFloat64, affine, random);
      mismatches += wrong;
      if (wrong == 0) continue;
      std::printf("MISMATCH batch_norm: outer %ld channels %ld inner %ld affine %d\n",
                  static_cast<long>(shape.outer), static_cast<long>(shape.channels),
                  static_cast<long>(shape.inner), affine);
    }
  }
  return mismatches;
}

const Checks kChecks(check_batch_norm);

}  // namespace

}  // namespace sparsekern::cpu
