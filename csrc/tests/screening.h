// Rounded rows against their definition in long double, and the candidates of slices of scores
// against all bounds at once. The scores and their errors are small integers: bounds are exact.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "interface/arguments.h"

namespace sparsekern::screening {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The nearest number with 8 bits, ties to even ones; below 2^-126 zero.
inline float rounded(float x) {
  if (std::isnan(x) || std::isinf(x)) return x;
  const uint32_t bits = bits_of(x), low = bits & 0xffff, down = bits & 0xffff0000;
  const bool up = low > 0x8000 || (low == 0x8000 && (bits & 0x10000) != 0);
  const float nearest = float_of(up ? down + 0x10000 : down);
  return std::abs(nearest) < std::numeric_limits<float>::min() ? 0.0f : nearest;
}

// At least the exact length, and hardly more.
inline bool bounds_length(float bound, long double square) {
  if (!std::isfinite(static_cast<float>(square))) return std::isinf(bound) && bound > 0;
  const long double length = std::sqrt(square);
  return bound >= length && bound <= length * 1.001L + 1e-17L;
}

// The kernels of one module, with any other arguments that they have.
struct Kernels {
  std::function<void(const RoundRowsArguments&)> round_rows;
  std::function<void(const ScreenScoresArguments&)> screen_scores;
};

inline bool check_rounding(const Kernels& kernels, int64_t rows, int64_t d, bool columns, int kind,
                           std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * d);
  for (float& element : x) {
    element = normal(random);
    if (kind == 1) element *= 1e-38f;                                    // subnormal, some of them
    if (kind == 2) element = float_of(static_cast<uint32_t>(random()));  // anything at all
  }
  std::vector<uint16_t> result(rows * d, 0x5a5a);
  std::vector<float> lengths(rows, -1), errors(rows, -1);
  const Matrix matrix{x.data(), kFloat32, rows, d, columns ? 1 : d, columns ? rows : 1};
  kernels.round_rows({matrix, result.data(), lengths.data(), errors.data()});
  bool right = true;
  for (int64_t b = 0; b < rows; ++b) {
    long double length = 0, error = 0;
    for (int64_t f = 0; f < d; ++f) {
      const int64_t at = columns ? f * rows + b : b * d + f;
      const float expected = rounded(x[at]), got = float_of(uint32_t{result[at]} << 16);
      right &= std::isnan(expected) ? std::isnan(got) : bits_of(expected) == bits_of(got);
      const long double lost = static_cast<long double>(x[at]) - expected;
      length += static_cast<long double>(x[at]) * x[at];
      error += lost * lost;
    }
    right &= std::isnan(length) ? std::isinf(lengths[b]) : bounds_length(lengths[b], length);
    right &= std::isnan(error) ? std::isinf(errors[b]) : bounds_length(errors[b], error);
  }
  return right;
}

struct Screening {
  int64_t rows, n, k, slice;
  bool affine, bfloat16;
  int levels;  // of scores: few of them make ties
};

// |score| * kScoreError is a part of the bound that bfloat16 can express, too.
constexpr float kScoreError = 0.25f;

class Check {
 public:
  Check(const Screening& shape, std::mt19937_64& random) : shape_(shape), random_(random) {
    const int64_t n = shape.n;
    for (int64_t i = 0; i < shape.rows * n; ++i) scores_.push_back(4.0f * whole(shape.levels));
    for (int64_t i = 0; i < n; ++i) {
      bias_.push_back(whole(3));
      scale_.push_back(std::exp2(whole(1)));
      lengths_.push_back(std::abs(whole(2)));
      errors_.push_back(std::abs(whole(1)));
    }
    for (int64_t b = 0; b < shape.rows; ++b) {
      x_errors_.push_back(std::abs(whole(1)));
      x_lengths_.push_back(b % 3 == 0 ? 0.0f : 1.0f);  // rows without a latent's error, too
    }
    if (shape.levels > 100) {  // what is not a number is never dropped
      scores_[random() % scores_.size()] = NAN;
      scores_[random() % scores_.size()] = INFINITY;
      scores_[random() % scores_.size()] = -INFINITY;
      lengths_[random() % lengths_.size()] = INFINITY;
    }
  }

  bool run(const Kernels& kernels) {
    const auto [rows, n, k, slice, affine, bfloat16, levels] = shape_;
    const int64_t capacity = std::max<int64_t>(512, 16 * k);
    std::vector<int32_t> latents(rows * capacity), counts(rows, 0);
    std::vector<float> lower(rows * capacity), upper(rows * capacity), thresholds(rows, NAN);
    for (int64_t first = 0; first < n; first += slice) {
      const int64_t width = std::min(slice, n - first);
      std::vector<float> part;
      std::vector<uint16_t> half;
      for (int64_t b = 0; b < rows; ++b) {
        for (int64_t i = first; i < first + width; ++i) {
          part.push_back(scores_[b * n + i]);
          half.push_back(static_cast<uint16_t>(bits_of(part.back()) >> 16));
        }
      }
      void* data = bfloat16 ? static_cast<void*>(half.data()) : part.data();
      kernels.screen_scores({{data, bfloat16 ? kBFloat16 : kFloat32, rows, width, width, 1},
                             first,
                             k,
                             affine ? bias_.data() + first : nullptr,
                             affine ? scale_.data() + first : nullptr,
                             x_errors_.data(),
                             x_lengths_.data(),
                             lengths_.data() + first,
                             errors_.data() + first,
                             kScoreError,
                             0.0f,
                             0.0f,
                             first + width == n,
                             capacity,
                             latents.data(),
                             lower.data(),
                             upper.data(),
                             counts.data(),
                             thresholds.data()});
    }
    bool right = true;
    for (int64_t b = 0; b < rows; ++b) {
      const auto expected = candidates(b);
      if (counts[b] < 0) {  // only a row with many may be given up
        right &= static_cast<int64_t>(expected.size()) * 4 > capacity;
        ++crowded;
        continue;
      }
      const int32_t* row = latents.data() + b * capacity;
      right &= std::vector<int32_t>(row, row + counts[b]) == expected;
    }
    return right;
  }

  int crowded = 0;

 private:
  float whole(int most) {
    return static_cast<float>(static_cast<int>(random_() % (2 * most + 1)) - most);
  }

  // By the definition: what k others before it do not exclude.
  std::vector<int32_t> candidates(int64_t b) const {
    const int64_t n = shape_.n;
    std::vector<float> lower, upper;
    for (int64_t i = 0; i < n; ++i) {
      float a = scores_[b * n + i];
      float r = x_errors_[b] * lengths_[i] + x_lengths_[b] * errors_[i] + kScoreError * std::abs(a);
      if (shape_.affine) a = (a + bias_[i]) * scale_[i], r *= scale_[i];
      lower.push_back(std::isnan(a - r) ? -INFINITY : a - r);
      upper.push_back(a + r);
    }
    std::vector<float> descending = lower;
    std::sort(descending.begin(), descending.end(), std::greater<float>());
    const float threshold = descending[shape_.k - 1];
    std::vector<int32_t> found;
    int64_t reaching = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool late = upper[i] == threshold && reaching >= shape_.k;
      reaching += lower[i] >= threshold;
      if (!late && !(upper[i] < threshold)) found.push_back(static_cast<int32_t>(i));
    }
    return found;
  }

  Screening shape_;
  std::mt19937_64& random_;
  std::vector<float> scores_, bias_, scale_, lengths_, errors_, x_errors_, x_lengths_;
};

// Returns the number of mismatches, and tells them. few: of the shapes, only some.
inline int check(const Kernels& kernels, bool few, int* rounding_cases, int* screening_cases) {
  std::mt19937_64 random(29);
  int mismatches = 0, crowded = 0;
  for (const int64_t rows : {1, 3, 40}) {
    for (const int64_t d : {1, 7, 16, 33, 100, 1030}) {
      if (few && rows * d > 1200) continue;
      for (const bool columns : {false, true}) {
        for (const int kind : {0, 1, 2}) {
          ++*rounding_cases;
          if (check_rounding(kernels, rows, d, columns, kind, random)) continue;
          ++mismatches;
          std::printf("MISMATCH round_rows: rows %ld d %ld columns %d kind %d\n",
                      static_cast<long>(rows), static_cast<long>(d), columns, kind);
        }
      }
    }
  }
  for (const int64_t n : {40, 700, 2100}) {
    for (const int64_t k : {1, 2, 13, 32}) {
      if (few && k == 2) continue;
      for (const int levels : {0, 2, 30, 2000}) {
        for (const bool affine : {false, true}) {
          const bool bfloat16 = levels < 60 && random() % 2 == 0;  // 8 bits hold these scores
          const int64_t slice = std::vector<int64_t>{n, 512, 77}[random() % 3];
          Check check(
              {1 + static_cast<int64_t>(random() % 6), n, k, slice, affine, bfloat16, levels},
              random);
          ++*screening_cases;
          const bool right = check.run(kernels);
          crowded += check.crowded;
          if (right) continue;
          ++mismatches;
          std::printf("MISMATCH screen_scores: n %ld k %ld slice %ld levels %d affine %d half %d\n",
                      static_cast<long>(n), static_cast<long>(k), static_cast<long>(slice), levels,
                      affine, bfloat16);
        }
      }
    }
  }
  if (crowded == 0) std::printf("MISMATCH screen_scores: no row had too many candidates\n");
  return mismatches + (crowded == 0);
}

}  // namespace sparsekern::screening
