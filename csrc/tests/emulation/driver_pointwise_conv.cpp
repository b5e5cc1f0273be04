// The sparse 1x1 convolution and its gradients under the emulation, against plain sums in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/kernels.h"
#include "tests/emulation/driver.h"
#include "tests/emulation/numbers.h"

namespace {

namespace cuda = sparsekern::cuda;

using sparsekern::Dtype;
using sparsekern::IndexType;
using sparsekern::kBFloat16;
using sparsekern::kFloat16;
using sparsekern::kFloat32;
using sparsekern::kInt32;
using sparsekern::kInt64;
using sparsekern::Matrix;
using sparsekern::emulation::kBytes;
using sparsekern::emulation::kRoundoff;
using sparsekern::emulation::kSmallestStep;
using sparsekern::emulation::Numbers;

enum Spread { kUniform, kOneSite, kOneChannel, kOutside, kSpreads };

struct Case {
  int64_t outer, channels, inner, outputs, count;
  Dtype dtype, weight_dtype;
  IndexType index_type;
  bool bias, transposed;  // of the weight: neighbours in memory are outputs
  int64_t shift;          // of out and grad, in numbers
  Spread spread;

  int64_t sites() const { return outer * inner; }
  int64_t stride_outputs() const { return transposed ? 1 : channels + 2; }
  int64_t stride_channels() const { return transposed ? outputs : 1; }
  Matrix matrix(const Numbers& weight) const {
    void* data = const_cast<unsigned char*>(weight.data());
    return {data, weight_dtype, outputs, channels, stride_outputs(), stride_channels()};
  }
};

// The failures of one case; only the first is told.
struct Verdict {
  const Case& c;
  bool failed = false;

  void expect(bool holds, const char* what, int64_t place) {
    if (holds || failed) return;
    failed = true;
    std::printf(
        "pointwise_conv: %s is wrong at %lld: outer %d channels %d inner %d outputs %d count %d "
        "dtypes "
        "%d %d index %d bias %d transposed %d shift %d spread %d\n",
        what, static_cast<long long>(place), int(c.outer), int(c.channels), int(c.inner),
        int(c.outputs), int(c.count), c.dtype, c.weight_dtype, c.index_type, c.bias, c.transposed,
        int(c.shift), c.spread);
  }
  // |x - truth| within the rounding of `terms` float32 operations on numbers that add up to
  // `magnitude`, and of the result. NaN fails.
  void near(double x, double truth, double magnitude, int64_t terms, Dtype dtype, const char* what,
            int64_t place) {
    const double sum = static_cast<double>(terms + 1) * kRoundoff[0] * magnitude;
    const double result =
        kRoundoff[dtype] * (std::fabs(truth) + sum) + (dtype == kFloat16 ? kSmallestStep : 0);
    expect(std::fabs(x - truth) <= sum + result, what, place);
  }
};

// A code as the truth sees it; site -1 for one that lies outside.
struct Code {
  int64_t index, site, channel;
  float value;
};

// A sum in double, and what its terms' magnitudes add up to.
struct Sum {
  double value = 0, magnitude = 0;
  int64_t terms = 0;

  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
    ++terms;
  }
};

int64_t draw_index(const Case& c, std::mt19937& random) {
  const int64_t size = c.outer * c.channels * c.inner;
  const auto below = [&](int64_t limit) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(std::max<int64_t>(limit, 1)));
  };
  const int64_t anywhere = below(size);
  switch (c.spread) {
    case kOneSite:
      return (c.outer / 2 * c.channels + below(c.channels)) * c.inner + c.inner / 2;
    case kOneChannel:
      return (below(c.outer) * c.channels + c.channels / 2) * c.inner + below(c.inner);
    case kOutside:
      if (below(4) != 0) return anywhere;
      // Cut to 32 bits, the last would be a good index.
      return c.index_type == kInt32 || below(2) == 0 ? (below(2) == 0 ? -1 : size)
                                                     : anywhere + (int64_t{1} << 32);
    default:
      return anywhere;
  }
}

struct Operands {
  std::vector<Code> codes;
  Numbers weight, bias, grad;
};

Operands draw(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t reach =
      c.channels == 0 || c.outputs == 0
          ? 0
          : (c.outputs - 1) * c.stride_outputs() + (c.channels - 1) * c.stride_channels() + 1;
  Operands o{{},
             Numbers(c.weight_dtype, reach),
             Numbers(c.weight_dtype, c.outputs),
             Numbers(c.dtype, c.sites() * c.outputs, c.shift)};
  Numbers value(c.dtype, 1);
  const int64_t size = c.outer * c.channels * c.inner;
  for (int64_t m = 0; m < c.count; ++m) {
    const int64_t index = draw_index(c, random);
    const bool inside = index >= 0 && index < size;
    // Values of codes that must contribute nothing are NaN.
    value.set(0, inside ? normal(random) : NAN);
    const int64_t block = c.channels * c.inner;
    const int64_t site = inside ? index / block * c.inner + index % c.inner : -1;
    o.codes.push_back(
        {index, site, inside ? index / c.inner % c.channels : -1, static_cast<float>(value[0])});
  }
  o.weight.poison(0xff);
  for (int64_t e = 0; e < c.outputs; ++e) {
    for (int64_t i = 0; i < c.channels; ++i) {
      o.weight.set(e * c.stride_outputs() + i * c.stride_channels(), normal(random));
    }
    o.bias.set(e, normal(random));
  }
  for (int64_t i = 0; i < c.sites() * c.outputs; ++i) o.grad.set(i, normal(random));
  return o;
}

// The codes as the kernels take them, in the order of a key, those outside last.
struct Grouped {
  std::vector<int64_t> order, wide;
  std::vector<int32_t> narrow;
  Numbers values;
  IndexType index_type;

  sparsekern::Codes codes() const {
    const void* indices =
        index_type == kInt64 ? static_cast<const void*>(wide.data()) : narrow.data();
    return {values.data(), values.dtype, indices, index_type, 1, values.size};
  }
};

Grouped group(const Case& c, const Operands& o, int64_t Code::* key) {
  Grouped grouped{std::vector<int64_t>(c.count), {}, {}, Numbers(c.dtype, c.count), c.index_type};
  std::iota(grouped.order.begin(), grouped.order.end(), 0);
  const auto key_of = [&](int64_t m) {
    const int64_t found = o.codes[m].*key;
    return found < 0 ? INT64_MAX : found;
  };
  std::stable_sort(grouped.order.begin(), grouped.order.end(),
                   [&](int64_t a, int64_t b) { return key_of(a) < key_of(b); });
  for (int64_t place = 0; place < c.count; ++place) {
    const Code& code = o.codes[grouped.order[place]];
    grouped.wide.push_back(code.index);
    grouped.narrow.push_back(static_cast<int32_t>(code.index));
    grouped.values.set(place, code.value);
  }
  return grouped;
}

void check_forward(const Case& c, const Operands& o, Verdict* verdict) {
  const Grouped codes = group(c, o, &Code::site);
  Numbers out(c.dtype, c.sites() * c.outputs, c.shift), again = out;
  // Two runs over different garbage: an element that is not written differs.
  for (Numbers* result : {&out, &again}) {
    result->poison(result == &out ? 0xff : 0x55);
    const sparsekern::PointwiseConvArguments call{
        codes.codes(), c.outer, c.inner, c.matrix(o.weight), c.bias ? o.bias.data() : nullptr,
        result->data()};
    std::vector<unsigned char> workspace(cuda::pointwise_conv_workspace(call), 0xff);
    cuda::pointwise_conv(call, workspace.data(), nullptr);
  }
  std::vector<Sum> sums(c.sites() * c.outputs);
  const auto place_of = [&](int64_t site, int64_t e) {
    return (site / c.inner * c.outputs + e) * c.inner + site % c.inner;
  };
  for (int64_t site = 0; site < c.sites(); ++site) {
    for (int64_t e = 0; c.bias && e < c.outputs; ++e) sums[place_of(site, e)].add(o.bias[e]);
  }
  for (const Code& code : o.codes) {
    for (int64_t e = 0; code.site >= 0 && e < c.outputs; ++e) {
      sums[place_of(code.site, e)].add(
          code.value * o.weight[e * c.stride_outputs() + code.channel * c.stride_channels()]);
    }
  }
  for (int64_t i = 0; i < c.sites() * c.outputs; ++i) {
    const bool same = out[i] == again[i];
    verdict->expect(same, "pointwise_conv, the second run", i);
    verdict->near(out[i], sums[i].value, sums[i].magnitude, sums[i].terms, c.dtype,
                  "pointwise_conv", i);
  }
}

// The gradients of one run, those of the values in the order of the codes.
struct Found {
  Numbers values, weight, bias;
};

Found run_backward(const Case& c, const Operands& o, const Grouped& codes, int garbage) {
  Found found{Numbers(c.dtype, c.count), Numbers(c.weight_dtype, c.outputs * c.channels),
              Numbers(c.weight_dtype, c.outputs)};
  for (Numbers* numbers : {&found.values, &found.weight, &found.bias}) numbers->poison(garbage);
  Numbers values = found.values;
  const sparsekern::PointwiseConvBackwardArguments call{
      o.grad.data(), codes.codes(),       c.outer,          c.inner, c.matrix(o.weight),
      values.data(), found.weight.data(), found.bias.data()};
  std::vector<unsigned char> workspace(cuda::pointwise_conv_backward_workspace(call),
                                       static_cast<unsigned char>(garbage));
  cuda::pointwise_conv_backward(call, workspace.data(), nullptr);
  for (int64_t place = 0; place < c.count; ++place) {
    found.values.set(codes.order[place], static_cast<float>(values[place]));
  }
  return found;
}

void check_backward(const Case& c, const Operands& o, Verdict* verdict) {
  const Grouped codes = group(c, o, &Code::channel);
  const Found found = run_backward(c, o, codes, 0xff);
  const Found again = run_backward(c, o, codes, 0x55);
  verdict->expect(found.values.bytes == again.values.bytes &&
                      found.bias.bytes == again.bias.bytes &&
                      found.weight.bytes == again.weight.bytes,
                  "pointwise_conv_backward, the second run", 0);
  std::vector<Sum> weight(c.outputs * c.channels), bias(c.outputs);
  for (int64_t m = 0; m < c.count; ++m) {
    const Code& code = o.codes[m];
    Sum dot;
    for (int64_t e = 0; code.site >= 0 && e < c.outputs; ++e) {
      const double g =
          o.grad[(code.site / c.inner * c.outputs + e) * c.inner + code.site % c.inner];
      dot.add(g * o.weight[e * c.stride_outputs() + code.channel * c.stride_channels()]);
      weight[e * c.channels + code.channel].add(g * code.value);
    }
    verdict->near(found.values[m], dot.value, dot.magnitude, dot.terms, c.dtype, "grad_values", m);
  }
  for (int64_t i = 0; i < c.sites() * c.outputs; ++i) bias[i / c.inner % c.outputs].add(o.grad[i]);
  for (int64_t e = 0; e < c.outputs; ++e) {
    verdict->near(found.bias[e], bias[e].value, bias[e].magnitude, bias[e].terms, c.weight_dtype,
                  "grad_bias", e);
  }
  for (int64_t i = 0; i < c.outputs * c.channels; ++i) {
    verdict->near(found.weight[i], weight[i].value, weight[i].magnitude, weight[i].terms,
                  c.weight_dtype, "grad_weight", i);
  }
}

struct Shape {
  int64_t outer, channels, inner, outputs, count;
};

// Short runs and long ones, on both sides of a vector and of a block of sites; more outputs than a
// warp takes at once; nothing at all.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1},    {3, 4, 1, 5, 20},    {200, 3, 1, 8, 90},  {2, 3, 16, 4, 50},
    {2, 3, 20, 3, 40},  {1, 5, 1100, 2, 99}, {70, 3, 2, 9, 200},  {5, 2, 7, 33, 60},
    {3, 4, 8, 70, 70},  {2, 3, 5, 130, 90},  {2, 6, 9, 4, 0},     {5, 3, 700, 1, 40},
    {1, 2, 2049, 3, 9}, {600, 2, 4, 2, 300}, {4, 2, 50, 3, 3000}, {0, 3, 4, 5, 0},
    {3, 0, 4, 5, 0},    {3, 4, 5, 0, 7},     {3, 4, 0, 5, 0},     {30, 40, 1, 6, 500},
    {99, 2, 1, 64, 90}, {90, 2, 2, 20, 60},  {40, 3, 6, 8, 50},   {50, 3, 3, 48, 70}};

constexpr Dtype kTypes[][2] = {{kFloat32, kFloat32},
                               {kBFloat16, kBFloat16},
                               {kFloat16, kFloat16},
                               {kBFloat16, kFloat32},
                               {kFloat16, kFloat32}};

int check(const Case& c, std::mt19937& random, int* cases) {
  ++*cases;
  Verdict verdict{c};
  const Operands o = draw(c, random);
  check_forward(c, o, &verdict);
  check_backward(c, o, &verdict);
  return verdict.failed;
}

int check_pointwise_conv(int* cases) {
  std::mt19937 random(20240923);
  int failures = 0;
  int turn = 0;
  for (const Shape& s : kShapes) {
    for (int repeat = 0; repeat < (sparsekern::emulation::quick ? 2 : 4); ++repeat) {
      ++turn;
      Case c{s.outer,
             s.channels,
             s.inner,
             s.outputs,
             s.count,
             kTypes[turn % 5][0],
             kTypes[turn % 5][1],
             turn / 2 % 2 == 0 ? kInt64 : kInt32,
             turn % 3 != 0,
             turn % 7 < 3,
             turn % 4 == 1 ? 1 : 0,
             static_cast<Spread>(turn % kSpreads)};
      failures += check(c, random, cases);
    }
  }
  if (sparsekern::emulation::quick) return failures;
  // Chunks of more codes than a warp has lanes, and one sum of all chunks' parts.
  failures += check({3, 2, 40, 2, 66000, kBFloat16, kFloat32, kInt32, true, false, 0, kOneChannel},
                    random, cases);
  return failures;
}

const sparsekern::emulation::Checks kChecks("pointwise_conv", check_pointwise_conv);

}  // namespace
