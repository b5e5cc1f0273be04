// Thresholds per channel, what exceeds them, and the sparse 1x1 convolution, against plain loops.
//
// Inputs of the convolution are multiples of 1/8, whose sums are exact in float32.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/cpu/driver.h"

namespace sparsekern::cpu {

namespace {

struct Case {
  int64_t outer, channels, inner;
  int threads;
  int64_t total() const { return outer * channels * inner; }
  int64_t channel(int64_t i) const { return i / inner % channels; }
};

const Case kCases[] = {{1, 1, 1, 1},   {1, 3, 1, 2},    {7, 1, 5, 1},     {50, 10, 1, 3},
                       {9, 17, 1, 2},  {3, 4, 7, 2},    {2, 5, 63, 2},    {3, 2, 64, 1},
                       {2, 3, 700, 3}, {2000, 9, 1, 3}, {4, 3, 20000, 3}, {900, 40, 3, 2}};

class Checker {
 public:
  Checker(const Kernels& kernels, Cases* cases) : kernels_(kernels), cases_(cases) {}

  int mismatches() const { return mismatches_; }

  template <class T>
  void thresholds(const Case& shape, Dtype dtype, int kind) {
    std::vector<T> x = numbers<T>(shape.total(), kind);
    const int64_t n = shape.outer * shape.inner;
    for (const int64_t rank : {int64_t{1}, n, n / 2 + 1, n - n / 20, n > 3 ? n - 3 : n}) {
      std::vector<T> found(static_cast<size_t>(shape.channels), T{-77});
      const ChannelTensor tensor{x.data(), dtype, shape.outer, shape.channels, shape.inner};
      kernels_.channel_threshold({tensor, rank, found.data()}, shape.threads);
      bool right = true;
      for (int64_t c = 0; c < shape.channels; ++c) {
        std::vector<T> column;
        for (int64_t i = 0; i < shape.total(); ++i) {
          if (shape.channel(i) == c) column.push_back(x[static_cast<size_t>(i)]);
        }
        std::sort(column.begin(), column.end(),  // NaN last
                  [](T a, T b) { return a < b || (b != b && a == a); });
        const T truth = column[static_cast<size_t>(rank - 1)], got = found[static_cast<size_t>(c)];
        const bool same = truth == got || (truth != truth && got != got);
        right = right && same && !(got == 0 && std::signbit(got));
      }
      expect(right, "channel_threshold", shape);
    }
  }

  template <class T>
  void excess(const Case& shape, Dtype dtype, bool normalised) {
    std::vector<T> x = numbers<T>(shape.total(), 0);
    const std::vector<T> t = numbers<T>(shape.channels, 0), scale = numbers<T>(shape.channels, 0);
    const std::vector<T> shift = numbers<T>(shape.channels, 0);
    std::vector<T> truth;
    std::vector<int64_t> places, counts(static_cast<size_t>(shape.channels));
    for (int64_t i = 0; i < shape.total(); ++i) {
      const size_t c = static_cast<size_t>(shape.channel(i));
      const T value = x[static_cast<size_t>(i)];
      const T z = normalised ? value * scale[c] + shift[c] : value;
      const bool active = !(z <= t[c]);
      truth.push_back(active ? z - t[c] : T{0});
      if (active) places.push_back(i);
      counts[c] += active;
    }
    const T* scales = normalised ? scale.data() : nullptr;
    const T* shifts = normalised ? shift.data() : nullptr;
    std::vector<T> y(truth.size(), T{-77});
    std::vector<int64_t> found(counts.size());
    const ChannelTensor tensor{x.data(), dtype, shape.outer, shape.channels, shape.inner};
    kernels_.threshold_relu({tensor, t.data(), scales, shifts, y.data(), found.data()},
                            shape.threads);
    expect(y == truth && found == counts, "threshold_relu", shape);
    const int64_t total = static_cast<int64_t>(places.size());
    for (const int64_t capacity : {total, total + 5, total - 1}) {
      if (capacity < 0) continue;
      std::vector<T> values(static_cast<size_t>(capacity), T{-77});
      std::vector<int64_t> indices(values.size(), -77);
      std::fill(found.begin(), found.end(), 0);
      kernels_.threshold_codes(
          {tensor, t.data(), scales, shifts, capacity, values.data(), indices.data(), found.data()},
          shape.threads);
      bool right = found == counts;
      for (size_t m = 0; m < values.size(); ++m) {
        const bool written = capacity >= total && static_cast<int64_t>(m) < total;
        const int64_t place = written ? places[m] : -77;
        right = right && indices[m] == place &&
                values[m] == (written ? truth[static_cast<size_t>(place)] : T{-77});
      }
      expect(right, "threshold_codes", shape);
    }
  }

  void convolution(const Case& shape, int64_t outputs, int64_t count) {
    const int64_t c = shape.channels, in = shape.inner;
    std::vector<float> values = eighths(count), weight = eighths(outputs * c);
    const std::vector<float> bias = eighths(outputs), grad = eighths(shape.outer * outputs * in);
    std::vector<int64_t> indices;
    for (int64_t m = 0; m < count; ++m) indices.push_back(uniform(0, shape.total() - 1));
    std::vector<float> out(grad.size()), of_values(values.size());
    std::vector<float> of_weight(weight.size()), of_bias(bias.size());
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t e = i / static_cast<size_t>(in) % static_cast<size_t>(outputs);
      out[i] = bias[e];
      of_bias[e] += grad[i];
    }
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = indices[static_cast<size_t>(m)], o = at / (c * in), channel = at / in % c;
      const float value = values[static_cast<size_t>(m)];
      for (int64_t e = 0; e < outputs; ++e) {
        const size_t place = static_cast<size_t>((o * outputs + e) * in + at % in);
        const size_t entry = static_cast<size_t>(e * c + channel);
        out[place] += value * weight[entry];
        of_values[static_cast<size_t>(m)] += grad[place] * weight[entry];
        of_weight[entry] += grad[place] * value;
      }
    }
    std::vector<float> got(out.size(), -77), got_values(values.size(), -77);
    std::vector<float> got_weight(weight.size(), -77), got_bias(bias.size(), -77);
    const Codes codes{values.data(), kFloat32, indices.data(), kInt64, 1, count};
    const Matrix matrix{weight.data(), kFloat32, outputs, c, c, 1};
    kernels_.pointwise_conv({codes, shape.outer, in, matrix, bias.data(), got.data()},
                            shape.threads);
    kernels_.pointwise_conv_backward({grad.data(), codes, shape.outer, in, matrix,
                                      got_values.data(), got_weight.data(), got_bias.data()},
                                     shape.threads);
    expect(got == out, "pointwise_conv", shape);
    expect(got_values == of_values && got_weight == of_weight && got_bias == of_bias,
           "pointwise_conv_backward", shape);
  }

 private:
  int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  std::vector<float> eighths(int64_t count) {
    std::vector<float> x;
    for (int64_t i = 0; i < count; ++i) x.push_back(static_cast<float>(uniform(-8, 8)) / 8);
    return x;
  }

  // 0: small eighths, with many ties; 1: normal; 2: with NaN, infinities and zeros of both signs.
  template <class T>
  std::vector<T> numbers(int64_t count, int kind) {
    std::normal_distribution<T> normal;
    const T infinity = std::numeric_limits<T>::infinity();
    const T odd[] = {std::numeric_limits<T>::quiet_NaN(), infinity, -infinity, T{-0.0}, T{0}};
    std::vector<T> x;
    for (int64_t i = 0; i < count; ++i) {
      if (kind == 0) x.push_back(static_cast<T>(uniform(-16, 16)) / 8);
      if (kind == 1) x.push_back(normal(random_));
      if (kind == 2) x.push_back(odd[uniform(0, 4)]);
    }
    return x;
  }

  void expect(bool right, const char* function, const Case& shape) {
    ++(*cases_)[function];
    if (right) return;
    ++mismatches_;
    std::printf("MISMATCH %s: outer %ld channels %ld inner %ld\n", function,
                static_cast<long>(shape.outer), static_cast<long>(shape.channels),
                static_cast<long>(shape.inner));
  }

  const Kernels& kernels_;
  Cases* cases_;
  int mismatches_ = 0;
  std::mt19937_64 random_{7};
};

int check_channels(const Kernels& kernels, Cases* cases) {
  Checker checker(kernels, cases);
  for (const Case& shape : kCases) {
    for (int kind = 0; kind < 3; ++kind) {
      checker.thresholds<float>(shape, kFloat32, kind);
      if (shape.total() < 20000) checker.thresholds<double>(shape, kFloat64, kind);
    }
    for (const bool normalised : {false, true}) {
      checker.excess<float>(shape, kFloat32, normalised);
      checker.excess<double>(shape, kFloat64, normalised);
    }
  }
  Checker convolutions(kernels, cases);
  for (const Case& shape : kCases) {
    for (const int64_t count : {0, 1, 60}) convolutions.convolution(shape, 19, count);
  }
  return checker.mismatches() + convolutions.mismatches();
}

const Checks kChecks(check_channels);

}  // namespace

}  // namespace sparsekern::cpu
