// The kernels that screen latents, against their definitions.
#include "cuda/kernels.h"
#include "tests/emulation/driver.h"
#include "tests/screening.h"

namespace {

using namespace sparsekern;

// Scores of listed latents against sums in double. Bias and scale are small integers.
bool check_scores(int64_t d, bool columns, int64_t shift, std::mt19937_64& random) {
  constexpr int64_t kRows = 5, kN = 40, kCapacity = 24, kColumns = 19;
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * d), weight(shift + kN * d), bias(kN), scale(kN);
  for (float& element : x) element = normal(random);
  for (float& element : weight) element = normal(random);
  for (int64_t i = 0; i < kN; ++i) {
    bias[i] = static_cast<float>(i % 5);
    scale[i] = static_cast<float>(i % 3 + 1);
  }
  std::vector<int32_t> latents(kRows * kCapacity), counts{0, 1, 7, kColumns, -1};
  for (int32_t& latent : latents) latent = static_cast<int32_t>(random() % kN);
  const float* matrix = weight.data() + shift;
  const int64_t stride_n = columns ? 1 : d, stride_d = columns ? kN : 1;
  std::vector<float> scores(kRows * kColumns, NAN);
  cuda::score_candidates({{x.data(), kFloat32, kRows, d, d, 1},
                          {const_cast<float*>(matrix), kFloat32, kN, d, stride_n, stride_d},
                          bias.data(),
                          columns ? nullptr : scale.data(),
                          latents.data(),
                          counts.data(),
                          kCapacity,
                          kColumns,
                          scores.data()},
                         nullptr);
  for (int64_t b = 0; b < kRows; ++b) {
    for (int64_t j = 0; j < kColumns; ++j) {
      const float got = scores[b * kColumns + j];
      if (j >= counts[b]) {
        if (got != -INFINITY) return false;
        continue;
      }
      const int32_t latent = latents[b * kCapacity + j];
      double sum = 0;
      for (int64_t f = 0; f < d; ++f) {
        sum += double{x[b * d + f]} * matrix[latent * stride_n + f * stride_d];
      }
      const double truth = (sum + bias[latent]) * (columns ? 1 : scale[latent]);
      if (!(std::abs(got - truth) <= 1e-4 * (1 + std::abs(truth)))) return false;
    }
  }
  return true;
}

int check_screening(int* cases) {
  const screening::Kernels kernels{
      [](const RoundRowsArguments& call) { cuda::round_rows(call, nullptr); },
      [](const ScreenScoresArguments& call) { cuda::screen_scores(call, nullptr); }};
  int mismatches = screening::check(kernels, emulation::quick, cases, cases);
  std::mt19937_64 random(31);
  for (const int64_t d : {1, 4, 31, 128, 260}) {
    for (const bool columns : {false, true}) {
      for (const int64_t shift : {0, 1}) {
        ++*cases;
        if (check_scores(d, columns, shift, random)) continue;
        ++mismatches;
        std::printf("MISMATCH score_candidates: d %ld columns %d shift %ld\n", static_cast<long>(d),
                    columns, static_cast<long>(shift));
      }
    }
  }
  return mismatches;
}

const emulation::Checks kChecks("screening", check_screening);

}  // namespace
