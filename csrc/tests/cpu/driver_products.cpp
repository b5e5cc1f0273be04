// The sparse products, the transposition and the firing counts against plain loops in double.
//
// Inputs are multiples of 1/8 between -2 and 2. They are exact in every dtype and their sums are
// exact in float32, so results must equal the truth, rounded once to the output's dtype.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/cpu/driver.h"

namespace {

using sparsekern::Codes;
using sparsekern::Dtype;
using sparsekern::IndexList;
using sparsekern::IndexType;
using sparsekern::kBFloat16;
using sparsekern::kFloat16;
using sparsekern::kFloat32;
using sparsekern::kFloat64;
using sparsekern::kInt32;
using sparsekern::kInt64;
using sparsekern::Matrix;
using sparsekern::cpu::Kernels;

constexpr size_t kBytes[] = {4, 2, 2, 8};
constexpr unsigned char kUntouched = 0x5a;

std::mt19937 random_bits(20250101);  // a fixed seed: every run checks the same cases
sparsekern::cpu::Cases cases;        // of this set
int mismatches = 0;

void expect(bool right, const std::string& function, const std::string& what) {
  if (right) return;
  ++mismatches;
  std::printf("MISMATCH %s: %s\n", function.c_str(), what.c_str());
}

int64_t uniform(int64_t low, int64_t high) {  // both included
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// ---- numbers in each dtype ----

double decode_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const double mantissa = bits & 1023;
  double x = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) x = mantissa == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -x : x;
}

double decode_bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

double decode_16(Dtype dtype, uint16_t bits) {
  return dtype == kFloat16 ? decode_half(bits) : decode_bfloat(bits);
}

double decode(Dtype dtype, const unsigned char* p) {
  uint16_t half;
  float single;
  double result;
  std::memcpy(&half, p, sizeof(half));
  if (kBytes[dtype] == sizeof(half)) return decode_16(dtype, half);
  std::memcpy(&single, p, sizeof(single));
  if (dtype == kFloat32) return single;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

// x rounded to the nearest number of a 16-bit dtype, ties to even, found by bisection.
uint16_t round_half(Dtype dtype, double x) {
  const auto value = [dtype](int code) {
    const int infinity = dtype == kFloat16 ? 0x7c00 : 0x7f80;
    if (code == infinity) return dtype == kFloat16 ? 0x1p16 : 0x1p128;  // where overflow would be
    return decode_16(dtype, static_cast<uint16_t>(code));
  };
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  int low = 0;
  int high = dtype == kFloat16 ? 0x7c00 : 0x7f80;
  if (magnitude >= value(high)) return static_cast<uint16_t>(sign | high);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (value(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - value(low);
  const double above = value(high) - magnitude;
  const bool up = above < below || (above == below && low % 2 == 1);
  return static_cast<uint16_t>(sign | (up ? high : low));
}

double rounded(Dtype dtype, double x) {
  if (dtype == kFloat64) return x;
  if (dtype == kFloat32) return static_cast<float>(x);
  return decode_16(dtype, round_half(dtype, x));
}

// ---- arrays: exactly as long as they must be, and only aligned to their elements ----

struct Array {
  Dtype dtype;
  size_t count;
  std::vector<unsigned char> bytes;

  Array(Dtype type, int64_t size)
      : dtype(type),
        count(static_cast<size_t>(size)),
        bytes((count + 1) * kBytes[type], kUntouched) {}
  void* data() { return bytes.data() + kBytes[dtype]; }
  double operator[](int64_t i) { return decode(dtype, bytes.data() + (i + 1) * kBytes[dtype]); }
  void set(int64_t i, double x) {
    unsigned char* p = bytes.data() + (i + 1) * kBytes[dtype];
    const float single = static_cast<float>(x);
    const uint16_t half = round_half(dtype == kFloat16 ? kFloat16 : kBFloat16, x);
    if (dtype == kFloat32) std::memcpy(p, &single, sizeof(single));
    if (dtype == kFloat64) std::memcpy(p, &x, sizeof(x));
    if (kBytes[dtype] == sizeof(half)) std::memcpy(p, &half, sizeof(half));
  }
};

Array random_array(Dtype dtype, int64_t count) {
  Array array(dtype, count);
  for (int64_t i = 0; i < count; ++i) array.set(i, static_cast<double>(uniform(-16, 16)) / 8);
  return array;
}

struct Indices {
  IndexType type;
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;

  // A third of all indices are 0: one latent far heavier than the others, and many duplicates.
  Indices(int64_t count, int64_t n, IndexType index_type) : type(index_type) {
    for (int64_t i = 0; i < count; ++i) set(i, uniform(0, 2) == 0 ? 0 : uniform(0, n - 1));
  }
  void set(int64_t i, int64_t index) {
    if (static_cast<size_t>(i) == wide.size()) wide.push_back(0), narrow.push_back(0);
    wide[static_cast<size_t>(i)] = index;
    narrow[static_cast<size_t>(i)] = static_cast<int32_t>(index);
  }
  const void* data() const {
    return type == kInt64 ? static_cast<const void*>(wide.data()) : narrow.data();
  }
  int64_t operator[](int64_t i) const { return wide[static_cast<size_t>(i)]; }
  IndexList list() const { return {data(), type, static_cast<int64_t>(wide.size())}; }
};

// ---- sparse_matmul ----

struct Problem {
  int64_t rows, k, n, d;
  Dtype dtype, weight_dtype;
  bool columns;
  IndexType index_type;

  int64_t stride_n() const { return columns ? 1 : d; }
  int64_t stride_d() const { return columns ? n : 1; }
  int64_t place(int64_t i, int64_t f) const { return i * stride_n() + f * stride_d(); }
  Matrix matrix(Array& weight) const {
    return {weight.data(), weight_dtype, n, d, stride_n(), stride_d()};
  }
  Codes codes(Array& values, const Indices& indices) const {
    return {values.data(), dtype, indices.data(), index_type, rows, k};
  }
  std::string name(const Kernels& kernels) const {
    char text[160];
    std::snprintf(text, sizeof(text), "%s rows %lld k %lld n %lld d %lld dtypes %d %d %s index %d",
                  kernels.instruction_set, static_cast<long long>(rows), static_cast<long long>(k),
                  static_cast<long long>(n), static_cast<long long>(d), dtype, weight_dtype,
                  columns ? "columns" : "rows", index_type);
    return text;
  }
};

void check_forward(const Kernels& kernels, const Problem& p, Array& values, Indices& indices,
                   Array& weight) {
  Array bias = random_array(p.weight_dtype, p.d);
  const bool biased = uniform(0, 1) == 1;
  Array out(p.dtype, p.rows * p.d);
  const auto run = [&](int threads) {
    return kernels.sparse_matmul(
        {p.codes(values, indices), p.matrix(weight), biased ? bias.data() : nullptr, out.data()},
        threads);
  };
  if (p.rows * p.k > 0) {
    const int64_t bad = uniform(0, p.rows * p.k - 1);
    const int64_t good = indices[bad];
    indices.set(bad, uniform(0, 1) == 0 ? -1 : p.n);
    expect(run(2) == bad, "sparse_matmul", "bad index, " + p.name(kernels));
    indices.set(bad, good);
  }
  bool right = run(static_cast<int>(uniform(1, 3))) == -1;
  for (int64_t b = 0; b < p.rows; ++b) {
    for (int64_t f = 0; f < p.d; ++f) {
      double truth = biased ? bias[f] : 0;
      for (int64_t e = b * p.k; e < (b + 1) * p.k; ++e) {
        truth += values[e] * weight[p.place(indices[e], f)];
      }
      right = right && out[b * p.d + f] == rounded(p.dtype, truth);
    }
  }
  expect(right, "sparse_matmul", p.name(kernels));
  ++cases["sparse_matmul"];
}

// One number of a transposition changed: it no longer is one.
void check_altered(const Kernels& kernels, const Problem& p, Indices& indices,
                   std::vector<int64_t>& offsets, std::vector<int32_t>& positions) {
  const auto fits = [&](int threads) {
    return kernels.is_transposition({indices.list(), p.n, offsets.data(), positions.data()},
                                    threads);
  };
  expect(fits(1) && fits(3), "is_transposition", p.name(kernels));
  for (const int64_t step : {int64_t{-1}, int64_t{1}, p.rows * p.k, INT64_MIN / 2}) {
    int64_t& offset = offsets[static_cast<size_t>(uniform(0, p.n))];
    offset += step;
    expect(step == 0 || !fits(1), "is_transposition", "an offset, " + p.name(kernels));
    offset -= step;
  }
  for (const int32_t other : {-1, INT32_MAX, INT32_MIN, static_cast<int32_t>(p.rows * p.k)}) {
    if (positions.empty()) break;
    int32_t& position = positions[static_cast<size_t>(uniform(0, p.rows * p.k - 1))];
    const int32_t before = position;
    position = other;
    expect(!fits(2), "is_transposition", "a position, " + p.name(kernels));
    position = before;
  }
  if (positions.size() > 1) {  // twice the same
    std::swap(positions[0], positions[1]);
    expect(!fits(2), "is_transposition", "two positions, " + p.name(kernels));
    std::swap(positions[0], positions[1]);
    const int32_t before = positions[0];
    positions[0] = positions[1];
    expect(!fits(2), "is_transposition", "a position twice, " + p.name(kernels));
    positions[0] = before;
  }
  ++cases["is_transposition"];
}

void check_backward(const Kernels& kernels, const Problem& p, Array& values, Indices& indices,
                    Array& weight) {
  const int64_t entries = p.rows * p.k;
  std::vector<int64_t> offsets(static_cast<size_t>(p.n) + 1);
  std::vector<int32_t> positions(static_cast<size_t>(entries));
  kernels.transpose_codes({indices.list(), p.n, offsets.data(), positions.data()}, 1);
  check_altered(kernels, p, indices, offsets, positions);
  Array grad = random_array(p.dtype, p.rows * p.d);
  std::vector<double> weight_truth(static_cast<size_t>(p.n * p.d));
  std::vector<double> values_truth(static_cast<size_t>(entries));
  for (int64_t e = 0; e < entries; ++e) {
    for (int64_t f = 0; f < p.d; ++f) {
      const double g = grad[e / p.k * p.d + f];
      const int64_t place = p.place(indices[e], f);
      weight_truth[static_cast<size_t>(place)] += values[e] * g;
      values_truth[static_cast<size_t>(e)] += weight[place] * g;
    }
  }
  for (int wanted = 1; wanted <= 3; ++wanted) {  // grad_values, grad_weight, both
    for (int threads : {1, 3, 16}) {
      Array grad_values(p.dtype, entries);
      Array grad_weight(p.weight_dtype, p.n * p.d);
      const bool checked = uniform(0, 1) == 1;
      Codes codes = p.codes(values, indices);
      if (!checked) codes.indices = nullptr;
      bool right = kernels.sparse_matmul_backward(
          {grad.data(), codes, p.matrix(weight), offsets.data(), positions.data(),
           wanted & 1 ? grad_values.data() : nullptr,
           wanted & 2 ? p.matrix(grad_weight) : Matrix{}},
          threads);
      for (int64_t e = 0; e < entries && (wanted & 1); ++e) {
        right = right && grad_values[e] == rounded(p.dtype, values_truth[static_cast<size_t>(e)]);
      }
      for (int64_t i = 0; i < p.n * p.d && (wanted & 2); ++i) {
        const double truth = weight_truth[static_cast<size_t>(i)];
        right = right && grad_weight[i] == rounded(p.weight_dtype, truth);
      }
      expect(right, "sparse_matmul_backward", p.name(kernels));
      ++cases["sparse_matmul_backward"];
    }
  }
}

// Every 16-bit number, and float32 numbers that are hard to round, through a product with 1.
void check_conversions(const Kernels& kernels) {
  const int64_t zero = 0;
  for (Dtype dtype : {kBFloat16, kFloat16}) {
    Array one(dtype, 1);
    one.set(0, 1);
    const int64_t d = 65536;
    for (Dtype weight_dtype : {dtype, kFloat32}) {
      Array weight(weight_dtype, d);
      Array out(dtype, d);
      for (int64_t i = 0; i < d; ++i) {
        const uint16_t bits = static_cast<uint16_t>(i);
        // Half way to the next number (a tie), or a hair to either side of it.
        const float x = static_cast<float>(decode_16(dtype, bits));
        const float next = std::nextafterf(x, i % 3 == 0 ? INFINITY : -INFINITY);
        const float tie = static_cast<float>(x * (1 + (dtype == kFloat16 ? 0x1p-11 : 0x1p-8)));
        const float single = i % 4 == 0 ? x : i % 4 == 1 ? next : tie;
        std::memcpy(
            static_cast<char*>(weight.data()) + i * static_cast<int64_t>(kBytes[weight_dtype]),
            weight_dtype == kFloat32 ? static_cast<const void*>(&single) : &bits,
            kBytes[weight_dtype]);
      }
      kernels.sparse_matmul({{one.data(), dtype, &zero, kInt64, 1, 1},
                             {weight.data(), weight_dtype, 1, d, d, 1},
                             nullptr,
                             out.data()},
                            1);
      bool right = true;
      for (int64_t i = 0; i < d; ++i) {
        const double x = weight[i];
        const double truth = std::isinf(x) || std::isnan(x) ? x : rounded(dtype, x);
        right = right && (out[i] == truth || (std::isnan(out[i]) && std::isnan(truth)));
      }
      expect(right, "conversions", kernels.instruction_set);
      ++cases["conversions"];
    }
  }
}

void check_sparse_matmul(const Kernels& kernels) {
  const int64_t shapes[][4] = {
      // rows, k, n, d: one element; empty batch; no entries; one above or below a vector, a block
      // of
      // latents, a tile of features; many rows (a heavy latent); more than a tile of sums
      {1, 1, 1, 1},   {0, 3, 5, 7},    {3, 0, 5, 7},     {5, 4, 17, 1},    {2, 9, 1, 33},
      {7, 5, 16, 16}, {9, 15, 33, 65}, {4, 11, 31, 129}, {300, 3, 70, 40}, {2, 8, 19, 1037},
  };
  const Dtype dtypes[][2] = {{kFloat32, kFloat32}, {kBFloat16, kBFloat16}, {kBFloat16, kFloat32},
                             {kFloat16, kFloat16}, {kFloat16, kFloat32},   {kFloat64, kFloat64}};
  for (const auto& shape : shapes) {
    for (const auto& pair : dtypes) {
      for (int layout = 0; layout < 2; ++layout) {
        const Problem p{shape[0], shape[1], shape[2],    shape[3],
                        pair[0],  pair[1],  layout == 1, uniform(0, 1) == 0 ? kInt64 : kInt32};
        Array values = random_array(p.dtype, p.rows * p.k);
        Array weight = random_array(p.weight_dtype, p.n * p.d);
        Indices indices(p.rows * p.k, p.n, p.index_type);
        check_forward(kernels, p, values, indices, weight);
        check_backward(kernels, p, values, indices, weight);
      }
    }
  }
  check_conversions(kernels);
}

// ---- transpose_codes and count_active ----

void check_lists(const Kernels& kernels, int64_t count, int64_t n, IndexType type, int threads) {
  const std::string name = std::string(kernels.instruction_set) + " count " +
                           std::to_string(count) + " n " + std::to_string(n);
  Indices indices(count, n, type);
  Array values = random_array(static_cast<Dtype>(uniform(0, 3)), count);
  std::vector<int64_t> offsets(static_cast<size_t>(n) + 1, -7);
  std::vector<int32_t> positions(static_cast<size_t>(count), -7);
  std::vector<int64_t> counts(static_cast<size_t>(n));
  std::vector<std::vector<int32_t>> lists(static_cast<size_t>(n));
  std::vector<int64_t> fired(static_cast<size_t>(n));
  for (int64_t e = 0; e < count; ++e) {
    lists[static_cast<size_t>(indices[e])].push_back(static_cast<int32_t>(e));
    fired[static_cast<size_t>(indices[e])] += values[e] != 0;
  }
  const auto transpose = [&] {
    return kernels.transpose_codes({indices.list(), n, offsets.data(), positions.data()}, threads);
  };
  const auto count_fired = [&] {
    const Codes codes{values.data(), values.dtype, indices.data(), type, 1, count};
    return kernels.count_active({codes, n, counts.data()}, threads);
  };
  if (count > 0) {
    const int64_t bad = uniform(0, count - 1);
    const int64_t good = indices[bad];
    indices.set(bad, uniform(0, 1) == 0 ? -1 : n);
    const bool refused = transpose() == bad && offsets[0] == -7 && positions[0] == -7;
    expect(refused, "transpose_codes", "bad index, " + name);
    expect(count_fired() == bad && counts == std::vector<int64_t>(static_cast<size_t>(n)),
           "count_active", "bad index, " + name);
    indices.set(bad, good);
  }
  bool right = transpose() == -1 && offsets[0] == 0;
  size_t place = 0;
  for (size_t i = 0; i < lists.size(); ++i) {
    for (int32_t position : lists[i]) right = right && positions[place++] == position;
    right = right && offsets[i + 1] == static_cast<int64_t>(place);
  }
  expect(right, "transpose_codes", name);
  expect(count_fired() == -1 && counts == fired, "count_active", name);
  ++cases["transpose_codes"];
  ++cases["count_active"];
}

void check_activity(const Kernels& kernels) {
  for (IndexType type : {kInt64, kInt32}) {
    for (int64_t count : {0, 1, 17, 4097, 70001, 300000}) {
      for (int64_t n : {1, 5, 1000, 40000}) check_lists(kernels, count, n, type, 3);
    }
  }
}

int check_products(const Kernels& kernels, sparsekern::cpu::Cases* all_cases) {
  cases.clear();
  mismatches = 0;
  check_sparse_matmul(kernels);
  check_activity(kernels);
  for (const auto& [kernel, count] : cases) (*all_cases)[kernel] += count;
  return mismatches;
}

const sparsekern::cpu::Checks kChecks(check_products);

}  // namespace
