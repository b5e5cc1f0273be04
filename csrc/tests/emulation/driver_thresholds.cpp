// Thresholds and what exceeds them under the emulation, against sorts and plain loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/channel_threshold/plan.h"
#include "cuda/kernels.h"
#include "tests/emulation/driver.h"
#include "tests/emulation/numbers.h"

namespace {

namespace cuda = sparsekern::cuda;

using sparsekern::emulation::kBytes;
using sparsekern::emulation::Numbers;

constexpr int kPoison = 0xa5;
const char* const kTypes[] = {"float32", "bfloat16", "float16"};

enum class Fill { normal, ties, few, lowest, nans, only_nans, zeros, ascending, narrow, count };
const char* const kFills[] = {"normal",    "ties",  "few",       "lowest", "nans",
                              "only nans", "zeros", "ascending", "narrow"};

// As the library chooses, or forced: blocks that own one channel or several, alone or with others,
// without lists, with room for a few ranks or for many.
enum class Way { chosen, run, runs, runs_few, runs_many, row, rows, rows_many, count };
const char* const kWays[] = {
    "chosen",           "run", "runs", "runs, few listed", "runs, many listed", "row", "rows",
    "rows, many listed"};

struct Case {
  int64_t outer, channels, inner;
  sparsekern::Dtype dtype = sparsekern::kFloat32;
  Fill fill = Fill::normal;
  int64_t shift = 0;  // of x and y, in numbers

  int64_t per_channel() const { return outer * inner; }
  int64_t size() const { return outer * channels * inner; }
  int64_t channel_of(int64_t i) const { return i / inner % channels; }
  sparsekern::ChannelTensor tensor(const Numbers& x) const {
    return {const_cast<unsigned char*>(x.data()), dtype, outer, channels, inner};
  }
  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof(line), "outer %d channels %d inner %d %s %s shift %d", int(outer),
                  int(channels), int(inner), kTypes[dtype], kFills[static_cast<int>(fill)],
                  int(shift));
    return line;
  }
};

int tell(const Case& c, const std::string& what) {
  std::printf("threshold: %s is wrong: %s\n", what.c_str(), c.text().c_str());
  return 1;
}

float number(const Case& c, int64_t i, std::mt19937& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto draw = [&](int count) { return static_cast<int>(random() % count); };
  const float normal = std::normal_distribution<float>()(random);
  switch (c.fill) {
    case Fill::ties:
      return 0.5f;
    case Fill::few:
      return static_cast<float>(draw(5) - 2);
    case Fill::lowest:
      return draw(9) == 0 ? normal : -kInfinity;
    case Fill::nans:
      return draw(5) == 0 ? NAN : draw(9) == 0 ? kInfinity : normal;
    case Fill::only_nans:
      return NAN;
    case Fill::zeros:
      return draw(20) == 0 ? normal : draw(2) == 0 ? 0.0f : -0.0f;
    case Fill::ascending:
      return static_cast<float>(i % 1024);
    case Fill::narrow:  // float32 numbers that differ in their last bits only
      return 1.0f + static_cast<float>(draw(3000)) * 1.1920929e-7f;
    default:
      return normal;
  }
}

Numbers draw(const Case& c) {
  Numbers x(c.dtype, c.size(), c.shift);
  std::mt19937 random(static_cast<unsigned>(c.size() * 31 + c.channels));
  for (int64_t i = 0; i < c.size(); ++i) {
    x.set(i, number(c, i, random));
    // NaNs of either sign.
    if (std::isnan(x[i]) && i % 2 == 0) x.data()[(i + 1) * kBytes[c.dtype] - 1] |= 0x80;
  }
  return x;
}

// ---- channel_threshold ----

cuda::ThresholdPlan plan_of(const Case& c, const Numbers& x, Way way) {
  switch (way) {
    case Way::run:
      return {true, 1, 0};
    case Way::runs:
      return {true, 3, 0};
    case Way::runs_few:
      return {true, 2, c.dtype == 0 ? 2 : 0};
    case Way::runs_many:
      return {true, 3, c.dtype == 0 ? 5000 : 0};
    case Way::row:
      return {false, 1, 0};
    case Way::rows:
      return {false, 2, 0};
    case Way::rows_many:
      return {false, 3, c.dtype == 0 ? 40 : 0};
    default:
      return cuda::plan_threshold(c.tensor(x));
  }
}

// What the rank-th smallest of each channel is, for all ranks.
std::vector<std::vector<double>> sorted_channels(const Case& c, const Numbers& x) {
  std::vector<std::vector<double>> channels(c.channels);
  for (int64_t i = 0; i < c.size(); ++i) channels[c.channel_of(i)].push_back(x[i]);
  for (auto& channel : channels) {
    std::sort(channel.begin(), channel.end(),
              [](double a, double b) { return std::isnan(b) ? !std::isnan(a) : a < b; });
  }
  return channels;
}

int check_ranks(const Case& c, int* cases) {
  const Numbers x = draw(c);
  const auto sorted = sorted_channels(c, x);
  const int64_t n = c.per_channel();
  int turn = static_cast<int>(c.size());
  int failures = 0;
  for (const int64_t rank : {int64_t{1}, n, (n + 1) / 2, n - n / 10}) {
    for (int way = 0; way < static_cast<int>(Way::count); ++way) {
      if (++turn % (sparsekern::emulation::quick ? 9 : 5) != 0) continue;
      ++*cases;
      const cuda::ThresholdPlan plan = plan_of(c, x, static_cast<Way>(way));
      std::vector<unsigned char> workspace(cuda::planned_workspace(plan, c.tensor(x)), kPoison);
      Numbers found(c.dtype, c.channels);
      found.poison(kPoison);
      cuda::channel_threshold({{c.tensor(x), rank, found.data()}, workspace.data(), nullptr}, plan);
      for (int64_t channel = 0; channel < c.channels; ++channel) {
        const double truth = sorted[channel][rank - 1];
        const bool same = std::isnan(truth) ? std::isnan(found[channel])
                                            : found[channel] == truth &&
                                                  !(truth == 0 && std::signbit(found[channel]));
        if (same) continue;
        failures += tell(c, "rank " + std::to_string(rank) + " " + kWays[way]);
        break;
      }
    }
  }
  return failures;
}

// The size of the workspace, and what the public function does with it.
int check_public(int* cases) {
  ++*cases;
  const Case c{20000, 2, 7, sparsekern::kFloat32, Fill::normal, 0};
  const Numbers x = draw(c);
  const auto sorted = sorted_channels(c, x);
  const int64_t rank = c.per_channel() - 5;
  Numbers found(c.dtype, c.channels);
  const sparsekern::ChannelThresholdArguments call{c.tensor(x), rank, found.data()};
  std::vector<unsigned char> workspace(cuda::channel_threshold_workspace(call), kPoison);
  cuda::channel_threshold(call, workspace.data(), nullptr);
  const bool same = found[0] == sorted[0][rank - 1] && found[1] == sorted[1][rank - 1];
  return same && !workspace.empty() ? 0 : tell(c, "channel_threshold");
}

// ---- threshold_relu and threshold_codes ----

struct Constants {
  std::vector<float> threshold, scale, shift;
  bool scaled;

  const float* scales() const { return scaled ? scale.data() : nullptr; }
  const float* shifts() const { return scaled ? shift.data() : nullptr; }
};

Constants draw_constants(const Case& c, bool scaled) {
  Constants constants{{}, {}, {}, scaled};
  std::mt19937 random(static_cast<unsigned>(c.size()));
  std::normal_distribution<float> normal;
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    const bool odd = random() % 8 == 0;
    constants.threshold.push_back(odd ? (random() % 2 == 0 ? NAN : 0.5f) : normal(random));
    constants.scale.push_back(normal(random));
    constants.shift.push_back(normal(random));
  }
  return constants;
}

// What the operations have to find.
struct Excess {
  Numbers y;
  std::vector<int64_t> indices, counts;
};

Excess excess_of(const Case& c, const Numbers& x, const Constants& constants, int64_t counted) {
  Excess excess{Numbers(c.dtype, c.size(), c.shift), {}, std::vector<int64_t>(c.channels, counted)};
  for (int64_t i = 0; i < c.size(); ++i) {
    const int64_t channel = c.channel_of(i);
    float z = static_cast<float>(x[i]);
    if (constants.scaled) z = std::fmaf(z, constants.scale[channel], constants.shift[channel]);
    const bool active = !(z <= constants.threshold[channel]);
    excess.y.set(i, active ? z - constants.threshold[channel] : 0.0f);
    if (!active) continue;
    excess.indices.push_back(i);
    ++excess.counts[channel];
  }
  return excess;
}

bool same_number(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

int check_relu(const Case& c, bool scaled, int* cases) {
  ++*cases;
  const Numbers x = draw(c);
  const Constants constants = draw_constants(c, scaled);
  const Excess wanted = excess_of(c, x, constants, 3);
  // Aligned like x, or not.
  Numbers y(c.dtype, c.size(), c.shift > 1 ? 0 : c.shift);
  y.poison(kPoison);
  std::vector<int64_t> counts(c.channels, 3);
  cuda::threshold_relu({c.tensor(x), constants.threshold.data(), constants.scales(),
                        constants.shifts(), y.data(), counts.data()},
                       nullptr);
  if (counts != wanted.counts) return tell(c, "threshold_relu, counts");
  for (int64_t i = 0; i < c.size(); ++i) {
    if (!same_number(y[i], wanted.y[i])) return tell(c, "threshold_relu, " + std::to_string(i));
  }
  return 0;
}

int check_codes(const Case& c, bool scaled, int* cases) {
  const Numbers x = draw(c);
  const Constants constants = draw_constants(c, scaled);
  const Excess wanted = excess_of(c, x, constants, 3);
  const int64_t all = static_cast<int64_t>(wanted.indices.size());
  int failures = 0;
  for (const int64_t capacity : {all, all + 5, all / 2, int64_t{0}}) {
    ++*cases;
    // Memory ends where the room ends: the sanitizer sees a write beyond it.
    Numbers values(c.dtype, capacity);
    values.poison(kPoison);
    std::vector<int64_t> indices(capacity, -7), counts(c.channels, 3);
    const sparsekern::ThresholdCodesArguments call{c.tensor(x),        constants.threshold.data(),
                                                   constants.scales(), constants.shifts(),
                                                   capacity,           values.data(),
                                                   indices.data(),     counts.data()};
    std::vector<unsigned char> workspace(cuda::threshold_codes_workspace(call), kPoison);
    cuda::threshold_codes(call, workspace.data(), nullptr);
    bool right = counts == wanted.counts;
    for (int64_t m = 0; m < capacity; ++m) {
      const bool written = m < all;
      right = right && indices[m] == (written ? wanted.indices[m] : -7);
      right = right && (!written || same_number(values[m], wanted.y[indices[m]]));
    }
    if (!right) failures += tell(c, "threshold_codes, room " + std::to_string(capacity));
  }
  return failures;
}

struct Shape {
  int64_t outer, channels, inner;
};

// One channel, one element, channels first and last, runs and rows on both sides of a vector, a
// warp, a block and a piece.
const Shape kShapes[] = {{1, 1, 1},    {3, 1, 7},   {5, 4, 1},    {2, 3, 31},   {2, 3, 33},
                         {40, 9, 1},   {7, 17, 2},  {3, 2, 100},  {1, 2, 4099}, {300, 10, 1},
                         {40, 65, 1},  {2, 70, 16}, {1, 1, 9000}, {90, 3, 15},  {9, 129, 3},
                         {600, 2, 12}, {4, 2, 264}, {1500, 16, 1}};

// Where only what comes after a threshold is worth looking at: many channels, several tiles.
const Shape kWideShapes[] = {{2, 4500, 1}, {3, 1501, 1}, {2, 5, 5000}, {1, 3000, 2}, {5, 700, 8}};

Case next_case(const Shape& shape, int turn) {
  Case c{shape.outer, shape.channels, shape.inner};
  c.dtype = static_cast<sparsekern::Dtype>(turn % 3);
  c.fill = static_cast<Fill>(turn / 3 % static_cast<int>(Fill::count));
  c.shift = turn % 4 == 0 ? 1 : turn % 7 == 0 ? 2 : 0;
  return c;
}

int check_threshold(int* cases) {
  int failures = check_public(cases);
  int turn = 0;
  for (const Shape& shape : kShapes) {
    for (int repeat = 0; repeat < 7; ++repeat) {
      ++turn;
      if (sparsekern::emulation::quick && turn % 8 != 0) continue;
      const Case c = next_case(shape, turn);
      failures += check_ranks(c, cases);
      failures += check_relu(c, turn % 2 == 0, cases);
      if (turn % 2 == 0) failures += check_codes(c, turn % 4 == 0, cases);
    }
  }
  for (const Shape& shape : kWideShapes) {
    for (int repeat = 0; repeat < (sparsekern::emulation::quick ? 1 : 4); ++repeat) {
      const Case c = next_case(shape, ++turn);
      failures += check_relu(c, turn % 2 == 0, cases);
      failures += check_codes(c, turn % 2 == 1, cases);
    }
  }
  return failures;
}

const sparsekern::emulation::Checks kChecks("thresholds", check_threshold);

}  // namespace
