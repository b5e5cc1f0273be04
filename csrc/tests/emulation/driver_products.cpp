// The sparse products, the transposition and the firing counts under the emulation, against plain
// sums in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "tests/emulation/driver.h"
#include "tests/emulation/numbers.h"

namespace {

namespace cuda = sparsekern::cuda;

using sparsekern::Dtype;
using sparsekern::IndexList;
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

enum Spread { kUniform, kOneLatent, kFewLatents, kOutside };

struct Case {
  int64_t rows, k, n, d;
  Dtype dtype, weight_dtype;
  IndexType index_type;
  bool columns, bias;
  int64_t pad, shift;  // of the dictionary's leading dimension and base, in numbers
  Spread spread;

  int64_t stride_n() const { return columns ? 1 : d + pad; }
  int64_t stride_d() const { return columns ? n + pad : 1; }
  int64_t weight_size() const {
    return n == 0 || d == 0 ? 0 : (n - 1) * stride_n() + (d - 1) * stride_d() + 1;
  }
  Matrix matrix(const void* data) const {
    return {const_cast<void*>(data), weight_dtype, n, d, stride_n(), stride_d()};
  }
  std::string text() const {
    char line[200];
    std::snprintf(
        line, sizeof(line),
        "rows %d k %d n %d d %d dtypes %d %d index %d columns %d bias %d pad %d shift %d spread %d",
        int(rows), int(k), int(n), int(d), dtype, weight_dtype, index_type, columns, bias, int(pad),
        int(shift), spread);
    return line;
  }
};

// The failures of one case; only the first is told.
struct Verdict {
  const Case& c;
  bool failed = false;

  void expect(bool holds, const char* what, int64_t place) {
    if (holds || failed) return;
    failed = true;
    std::printf("products: %s is wrong at %lld: %s\n", what, static_cast<long long>(place),
                c.text().c_str());
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

struct Operands {
  std::vector<int64_t> wide;    // the indices as int64
  std::vector<int32_t> narrow;  // and as int32
  Numbers values, weight, bias, grad;
  IndexType index_type;

  const void* indices() const {
    return index_type == kInt64 ? static_cast<const void*>(wide.data()) : narrow.data();
  }
  sparsekern::Codes codes(const Case& c) const {
    return {values.data(), c.dtype, indices(), index_type, c.rows, c.k};
  }
};

int64_t draw_index(const Case& c, std::mt19937& random) {
  const auto below = [&](int64_t limit) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(std::max<int64_t>(limit, 1)));
  };
  switch (c.spread) {
    case kOneLatent:
      return c.n / 2;
    case kFewLatents:
      return below(4) == 0 ? below(c.n) : below(std::min<int64_t>(c.n, 2));
    case kOutside:
      switch (below(8)) {
        case 0:
          return -1;
        case 1:
          return c.n + below(3);
        case 2:
          // Cut to 32 bits, the first would be a good index.
          if (c.index_type == kInt64) return below(c.n) + (int64_t{1} << 32);
          return below(2) == 0 ? INT32_MAX : INT32_MIN;
      }
      return below(c.n);
    default:
      return below(c.n);
  }
}

Operands draw(const Case& c, std::mt19937& random) {
  Operands o{{},
             {},
             Numbers(c.dtype, c.rows * c.k),
             Numbers(c.weight_dtype, c.weight_size(), c.shift),
             Numbers(c.weight_dtype, c.d),
             Numbers(c.dtype, c.rows * c.d),
             c.index_type};
  std::normal_distribution<float> normal;
  for (int64_t e = 0; e < c.rows * c.k; ++e) {
    const int64_t index = draw_index(c, random);
    o.wide.push_back(index);
    o.narrow.push_back(static_cast<int32_t>(index));
    // Values of codes that must contribute nothing are NaN.
    const bool inside = index >= 0 && index < c.n;
    o.values.set(e, !inside ? NAN : random() % 8 == 0 ? 0.0f : normal(random));
  }
  o.weight.poison(0xff);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t f = 0; f < c.d; ++f)
      o.weight.set(i * c.stride_n() + f * c.stride_d(), normal(random));
  }
  for (int64_t f = 0; f < c.d; ++f) o.bias.set(f, normal(random));
  for (int64_t i = 0; i < c.rows * c.d; ++i) o.grad.set(i, normal(random));
  return o;
}

// The truth of one forward product.
void check_forward(const Case& c, const Operands& o, Verdict* verdict) {
  Numbers out(c.dtype, c.rows * c.d), again(c.dtype, c.rows * c.d);
  // Two runs over different garbage: an element that is not written differs.
  for (Numbers* result : {&out, &again}) {
    result->poison(result == &out ? 0xff : 0x55);
    cuda::sparse_matmul(
        {o.codes(c), c.matrix(o.weight.data()), c.bias ? o.bias.data() : nullptr, result->data()},
        nullptr);
  }
  verdict->expect(out.bytes == again.bytes, "sparse_matmul, the second run", 0);
  for (int64_t b = 0; b < c.rows; ++b) {
    for (int64_t f = 0; f < c.d; ++f) {
      double sum = c.bias ? o.bias[f] : 0.0;
      double magnitude = std::fabs(sum);
      for (int64_t e = b * c.k; e < (b + 1) * c.k; ++e) {
        if (o.wide[e] < 0 || o.wide[e] >= c.n) continue;
        const double term = o.values[e] * o.weight[o.wide[e] * c.stride_n() + f * c.stride_d()];
        sum += term;
        magnitude += std::fabs(term);
      }
      verdict->near(out[b * c.d + f], sum, magnitude, c.k, c.dtype, "sparse_matmul", b * c.d + f);
    }
  }
}

// The lists of one transposition; `positions` has exactly the listed ones.
struct Lists {
  std::vector<int64_t> offsets;
  std::vector<int32_t> positions;
};

Lists check_transpose(const Case& c, const Operands& o, Verdict* verdict) {
  const int64_t count = c.rows * c.k;
  Lists truth{std::vector<int64_t>(c.n + 1), {}};
  std::vector<std::vector<int32_t>> lists(c.n);
  for (int64_t e = 0; e < count; ++e)
    if (o.wide[e] >= 0 && o.wide[e] < c.n) lists[o.wide[e]].push_back(static_cast<int32_t>(e));
  for (int64_t i = 0; i < c.n; ++i) {
    truth.positions.insert(truth.positions.end(), lists[i].begin(), lists[i].end());
    truth.offsets[i + 1] = static_cast<int64_t>(truth.positions.size());
  }
  Lists lists_found{std::vector<int64_t>(c.n + 1, -7), std::vector<int32_t>(count, -7)};
  const sparsekern::TransposeCodesArguments call{{o.indices(), c.index_type, count},
                                                 c.n,
                                                 lists_found.offsets.data(),
                                                 lists_found.positions.data()};
  std::vector<unsigned char> workspace(cuda::transpose_codes_workspace(call), 0xff);
  cuda::transpose_codes(call, workspace.data(), nullptr);
  for (int64_t i = 0; i <= c.n; ++i)
    verdict->expect(lists_found.offsets[i] == truth.offsets[i], "transpose_codes, offsets", i);
  for (size_t e = 0; e < truth.positions.size(); ++e)
    verdict->expect(lists_found.positions[e] == truth.positions[e], "transpose_codes, positions",
                    e);
  return truth;
}

// Both gradients of one run; what is not wanted stays empty.
struct Found {
  Numbers values, weight;
};

Found run_backward(const Case& c, const Operands& o, const Lists& lists, bool want_values,
                   bool want_weight, int garbage) {
  Found found{Numbers(c.dtype, want_values ? c.rows * c.k : 0),
              Numbers(c.weight_dtype, want_weight ? c.weight_size() : 0, c.shift)};
  found.values.poison(garbage);
  found.weight.poison(garbage);
  const sparsekern::SparseMatmulBackwardArguments call{
      o.grad.data(),
      o.codes(c),
      c.matrix(o.weight.data()),
      lists.offsets.data(),
      lists.positions.data(),
      want_values ? found.values.data() : nullptr,
      c.matrix(want_weight ? found.weight.data() : nullptr)};
  std::vector<unsigned char> workspace(cuda::sparse_matmul_backward_workspace(call), garbage);
  cuda::sparse_matmul_backward(call, workspace.data(), nullptr);
  return found;
}

void check_grad_values(const Case& c, const Operands& o, const Numbers& found, Verdict* verdict) {
  for (int64_t e = 0; e < c.rows * c.k; ++e) {
    double sum = 0.0, magnitude = 0.0;
    const bool inside = o.wide[e] >= 0 && o.wide[e] < c.n;
    for (int64_t f = 0; inside && f < c.d; ++f) {
      const double term =
          o.grad[e / c.k * c.d + f] * o.weight[o.wide[e] * c.stride_n() + f * c.stride_d()];
      sum += term;
      magnitude += std::fabs(term);
    }
    verdict->near(found[e], sum, magnitude, c.d, c.dtype, "grad_values", e);
  }
}

void check_grad_weight(const Case& c, const Operands& o, const Lists& lists, const Numbers& found,
                       Verdict* verdict) {
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t f = 0; f < c.d; ++f) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t place = lists.offsets[i]; place < lists.offsets[i + 1]; ++place) {
        const int64_t e = lists.positions[place];
        const double term = o.values[e] * o.grad[e / c.k * c.d + f];
        sum += term;
        magnitude += std::fabs(term);
      }
      const int64_t place = i * c.stride_n() + f * c.stride_d();
      verdict->near(found[place], sum, magnitude, lists.offsets[i + 1] - lists.offsets[i],
                    c.weight_dtype, "grad_weight", place);
    }
  }
}

// Whether the bytes between the rows (or columns) of the gradient still have the garbage.
void check_padding(const Case& c, const Numbers& found, int garbage, Verdict* verdict) {
  const int64_t length = c.columns ? c.n : c.d;
  for (int64_t i = 0; i < found.size; ++i) {
    const unsigned char* bytes = found.data() + i * kBytes[found.dtype];
    if (i % (length + c.pad) < length) continue;
    verdict->expect(bytes[0] == garbage && bytes[1] == garbage, "the gradient's padding", i);
  }
}

void check_backward(const Case& c, const Operands& o, const Lists& lists, Verdict* verdict) {
  const Found both = run_backward(c, o, lists, true, true, 0xff);
  check_grad_values(c, o, both.values, verdict);
  check_grad_weight(c, o, lists, both.weight, verdict);
  check_padding(c, both.weight, 0xff, verdict);
  const Found values = run_backward(c, o, lists, true, false, 0x55);
  verdict->expect(values.values.bytes == both.values.bytes, "grad_values alone", 0);
  const Found weight = run_backward(c, o, lists, false, true, 0x55);
  check_padding(c, weight.weight, 0x55, verdict);
  for (int64_t i = 0; i < c.n * c.d; ++i) {
    const int64_t place = i / c.d * c.stride_n() + i % c.d * c.stride_d();
    const int64_t bytes = kBytes[c.weight_dtype];
    verdict->expect(std::memcmp(weight.weight.data() + place * bytes,
                                both.weight.data() + place * bytes, bytes) == 0,
                    "grad_weight alone", place);
  }
}

void check_counts(const Case& c, Operands& o, Verdict* verdict) {
  const int64_t count = c.rows * c.k;
  if (count > 0) o.values.set(count - 1, NAN);  // counts as fired
  if (count > 1) o.values.set(0, -0.0f);        // does not
  for (const bool with_values : {false, true}) {
    std::vector<int64_t> found(c.n, 3), truth(c.n, 3);
    for (int64_t e = 0; e < count; ++e) {
      if (o.wide[e] < 0 || o.wide[e] >= c.n) continue;
      truth[o.wide[e]] += !with_values || o.values[e] != 0.0;
    }
    sparsekern::Codes codes = o.codes(c);
    if (!with_values) codes.values = nullptr;
    cuda::count_active({codes, c.n, found.data()}, nullptr);
    for (int64_t i = 0; i < c.n; ++i) verdict->expect(found[i] == truth[i], "count_active", i);
  }
}

constexpr int kForward = 1, kLists = 2, kBackward = 4, kCounts = 8, kAll = 15, kGradWeight = 16;

// 1 when the case fails.
int check_case(const Case& c, int what, std::mt19937& random) {
  Verdict verdict{c};
  Operands o = draw(c, random);
  if (what & kForward) check_forward(c, o, &verdict);
  const Lists lists = what & ~(kForward | kCounts) ? check_transpose(c, o, &verdict) : Lists{};
  if (what & kBackward) check_backward(c, o, lists, &verdict);
  if (what & kGradWeight)
    check_grad_weight(c, o, lists, run_backward(c, o, lists, false, true, 0xff).weight, &verdict);
  if (what & kCounts) check_counts(c, o, &verdict);
  return verdict.failed;
}

constexpr Dtype kTypes[][2] = {{kFloat32, kFloat32},
                               {kBFloat16, kBFloat16},
                               {kFloat16, kFloat16},
                               {kBFloat16, kFloat32},
                               {kFloat16, kFloat32}};

// Small shapes, so that most lie off the boundaries of vectors, warps and blocks.
Case draw_case(int number, std::mt19937& random) {
  const auto between = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  Case c{};
  c.rows = between(1, 9);
  c.k = between(1, 40);
  c.n = between(1, 70);
  // Half of them in whole vectors.
  c.d = number % 2 == 0 ? between(1, 37) * 8 : between(1, 300);
  c.dtype = kTypes[number % 5][0];
  c.weight_dtype = kTypes[number % 5][1];
  c.index_type = number / 2 % 2 == 0 ? kInt64 : kInt32;
  c.columns = number % 4 >= 2;
  c.bias = number % 3 == 0;
  c.pad = number % 3 == 1 ? 8 : number % 3 == 2 ? between(0, 3) : 0;
  c.shift = number % 7 == 3 ? 1 : 0;
  c.spread = static_cast<Spread>(number / 3 % 4);
  return c;
}

int check_products(int* cases) {
  std::mt19937 random(20240607);
  int failures = 0;
  const auto check = [&](const Case& c, int what) {
    ++*cases;
    failures += check_case(c, what, random);
  };
  const int wanted = sparsekern::emulation::quick ? 40 : 120;
  for (int number = 0; number < wanted; ++number) check(draw_case(number, random), kAll);
  // Nothing to sum, nothing to list.
  check({0, 3, 5, 9, kFloat32, kFloat32, kInt64, false, true, 0, 0, kUniform}, kAll);
  check({3, 0, 5, 9, kBFloat16, kBFloat16, kInt32, true, true, 0, 0, kUniform}, kAll);
  check({3, 2, 5, 0, kFloat32, kFloat32, kInt64, false, false, 0, 0, kUniform}, kAll);
  check({3, 2, 0, 5, kFloat32, kFloat32, kInt64, false, true, 0, 0, kOutside}, kForward);
  // Latents with more entries than one block takes.
  check({30, 40, 4, 40, kBFloat16, kBFloat16, kInt64, false, false, 0, 0, kOneLatent}, kBackward);
  check({30, 40, 9, 37, kFloat32, kFloat32, kInt64, true, false, 0, 0, kFewLatents}, kBackward);
  check({40, 36, 3, 72, kFloat16, kFloat32, kInt32, true, false, 0, 0, kFewLatents}, kBackward);
  // Two slices of features in the tile of a column-major block.
  check({4, 5, 4, 2051, kBFloat16, kFloat32, kInt64, true, true, 0, 0, kFewLatents}, kAll);
  // The search for hot latents takes two rounds, and the second finds the last latent.
  check({3, 43775, 200, 1, kFloat32, kFloat32, kInt32, false, false, 0, 0, kUniform}, kGradWeight);
  // Several tiles in the sort and two digits.
  check({66, 70, 300, 8, kFloat32, kFloat32, kInt32, false, false, 0, 0, kOutside},
        kLists | kCounts);
  if (sparsekern::emulation::quick) return failures;
  // Several slices of features, and more dot products than wait for them.
  check({20, 16, 2, 4104, kBFloat16, kBFloat16, kInt64, false, false, 0, 0, kFewLatents},
        kBackward);
  check({3, 5, 4, 4099, kFloat32, kFloat32, kInt64, false, true, 0, 0, kUniform}, kAll);
  check({20, 16, 20, 2056, kFloat16, kFloat16, kInt64, true, false, 0, 0, kUniform}, kBackward);
  check({33, 16, 2, 4120, kBFloat16, kBFloat16, kInt64, false, false, 0, 0, kOneLatent}, kBackward);
  // Several chunks of latents, one feature at a time, and several rounds of rows.
  check({5, 33, 40000, 3, kBFloat16, kBFloat16, kInt64, true, true, 0, 0, kUniform}, kForward);
  check({300, 2, 5000, 5, kFloat32, kFloat32, kInt64, true, false, 0, 0, kUniform},
        kForward | kCounts);
  // Many tiles: the scan takes three launches. All digits of 8 bits. Three digits.
  check({400, 170, 256, 1, kFloat32, kFloat32, kInt64, false, false, 0, 0, kOutside},
        kLists | kCounts);
  check({20, 10, 70000, 1, kFloat32, kFloat32, kInt64, false, false, 0, 0, kFewLatents},
        kLists | kCounts);
  return failures;
}

const sparsekern::emulation::Checks kChecks("products", check_products);

}  // namespace
