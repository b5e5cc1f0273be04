// Top-k against a sort by value and index, on random bit patterns (NaN, infinities, subnormals), on
// rows with many ties or infinities and on numbers that differ in their lowest bits alone, in every
// dtype, layout and way of selecting.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "tests/cpu/driver.h"

namespace sparsekern::cpu {

namespace {

constexpr size_t kBytes[] = {4, 2, 2, 8};  // float32, bfloat16, float16, float64
// In the place of a number of patterns.
constexpr int kNeighbours = -1, kInfinities = -2;
constexpr uint64_t kMinusInfinity[] = {0xff800000, 0xff80, 0xfc00, 0xfff0000000000000};
constexpr int kExponentBit[] = {23, 7, 10, 52};  // cleared, no value is infinite or NaN

double decode(int dtype, uint64_t bits) {
  if (dtype == 3) {
    double x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  if (dtype == 2) {
    const int exponent = static_cast<int>(bits >> 10) & 31;
    const double mantissa = static_cast<double>(bits & 1023);
    double x =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) x = mantissa == 0 ? INFINITY : NAN;
    return (bits & 0x8000) != 0 ? -x : x;
  }
  const uint32_t wide = static_cast<uint32_t>(dtype == 1 ? bits << 16 : bits);
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

struct Shape {
  int64_t rows, n, k;
};

struct Order {
  bool sorted, relu, abs, smallest;
};

class Check {
 public:
  Check(const Kernels& kernels, Dtype dtype, const Shape& shape, Order order, bool strided,
        int patterns, bool with_nan, std::mt19937_64& random)
      : kernels_(kernels), dtype_(dtype), shape_(shape), order_(order), strided_(strided) {
    const size_t bytes = kBytes[dtype];
    x_.resize(static_cast<size_t>(shape.rows * shape.n) * bytes);
    std::vector<uint64_t> choice(static_cast<size_t>(patterns < 0 ? 1 : patterns));
    for (auto& bits : choice) bits = random() >> (64 - 8 * bytes);
    for (int64_t i = 0; i < shape.rows * shape.n; ++i) {
      uint64_t bits =
          patterns > 0 ? choice[random() % choice.size()] : random() >> (64 - 8 * bytes);
      // neighbours, and now and then a number far from them
      if (patterns == kNeighbours) {
        bits = random() % 64 == 0 ? random() >> (64 - 8 * bytes) : choice[0] ^ (random() & 0x3f);
      }
      if (patterns == kInfinities && random() % 64 != 0) bits = kMinusInfinity[dtype];
      if (!with_nan) bits &= ~(uint64_t{1} << kExponentBit[dtype]);
      std::memcpy(x_.data() + i * bytes, &bits, bytes);
    }
    if (!with_nan && patterns == 0 && random() % 2 == 0) ascend();
  }

  // Whether all outputs are right.
  bool run(int threads) {
    const auto [rows, n, k] = shape_;
    const size_t bytes = kBytes[dtype_];
    std::vector<unsigned char> values(rows * k * bytes), masked(rows * n * bytes, 0x5a);
    std::vector<unsigned char> dense(rows * n * bytes, 0x5a);
    std::vector<int64_t> indices(rows * k), counts(n), expected_counts(n);
    const Matrix x{x_.data(), dtype_, rows, n, strided_ ? 1 : n, strided_ ? rows : 1};
    kernels_.topk({x, k, order_.sorted, order_.relu, order_.abs, values.data(), indices.data(),
                   order_.smallest ? nullptr : masked.data(), counts.data(), order_.smallest},
                  threads);
    const Codes codes{values.data(), dtype_, indices.data(), kInt64, rows, k};
    kernels_.codes_to_dense({codes, n, dense.data()}, threads);
    if (order_.smallest) masked = dense;
    bool right = dense == masked;
    for (int64_t b = 0; b < rows; ++b) {
      std::vector<unsigned char> row(n * bytes);
      const std::vector<int64_t> order = expected(b);
      for (int64_t j = 0; j < k; ++j) {
        const int64_t i = order[j];
        uint64_t bits = bits_at(b, i);
        if (order_.relu && decode(dtype_, bits) <= 0) bits = 0;
        std::memcpy(row.data() + i * bytes, &bits, bytes);
        right &= indices[b * k + j] == i;
        right &= std::memcmp(values.data() + (b * k + j) * bytes, &bits, bytes) == 0;
        expected_counts[i] += !(decode(dtype_, bits) == 0);
      }
      right &= std::memcmp(row.data(), masked.data() + b * n * bytes, n * bytes) == 0;
    }
    return right && counts == expected_counts;
  }

 private:
  uint64_t bits_at(int64_t b, int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, x_.data() + place(b, i) * kBytes[dtype_], kBytes[dtype_]);
    return bits;
  }

  void ascend() {
    std::vector<uint64_t> row(shape_.n);
    for (int64_t b = 0; b < shape_.rows; ++b) {
      for (int64_t i = 0; i < shape_.n; ++i) row[i] = bits_at(b, i);
      std::stable_sort(row.begin(), row.end(), [&](uint64_t p, uint64_t q) {
        return decode(dtype_, p) < decode(dtype_, q);
      });
      for (int64_t i = 0; i < shape_.n; ++i) {
        std::memcpy(x_.data() + place(b, i) * kBytes[dtype_], &row[i], kBytes[dtype_]);
      }
    }
  }

  int64_t place(int64_t b, int64_t i) const {
    return strided_ ? i * shape_.rows + b : b * shape_.n + i;
  }

  std::vector<int64_t> expected(int64_t b) const {
    // NaN before +infinity, both signs alike; the index stands last, since the first of equals
    // wins.
    std::vector<std::tuple<bool, double, int64_t>> row(shape_.n);
    for (int64_t i = 0; i < shape_.n; ++i) {
      const double x = decode(dtype_, bits_at(b, i));
      const bool nan = std::isnan(x);
      const double value = nan ? 0 : order_.abs ? std::abs(x) : x;
      row[i] = order_.smallest ? std::make_tuple(nan, value, i) : std::make_tuple(!nan, -value, i);
    }
    std::partial_sort(row.begin(), row.begin() + shape_.k, row.end());
    std::vector<int64_t> order;
    for (int64_t j = 0; j < shape_.k; ++j) order.push_back(std::get<2>(row[j]));
    if (!order_.sorted) std::sort(order.begin(), order.end());
    return order;
  }

  const Kernels& kernels_;
  Dtype dtype_;
  Shape shape_;
  Order order_;
  bool strided_;
  std::vector<unsigned char> x_;
};

int check_topk(const Kernels& kernels, Cases* cases) {
  // around vectors, blocks, segments and the bounds between the ways of selecting
  const Shape shapes[] = {{1, 1, 1},       {3, 7, 7},       {2, 16, 3},       {2, 17, 16},
                          {2, 33, 32},     {3, 500, 50},    {2, 512, 200},    {2, 1000, 1},
                          {2, 2049, 512},  {2, 4096, 32},   {2, 4097, 32},    {2, 4111, 64},
                          {2, 4096, 400},  {1, 9001, 512},  {2, 5000, 513},   {1, 5000, 1100},
                          {1, 6000, 6000}, {1, 8192, 512},  {2, 32768, 40},   {1, 32769, 65},
                          {1, 40000, 512}, {1, 200000, 40}, {1, 150000, 300}, {3, 64, 40},
                          {5, 65, 1},      {2, 200, 129},   {2, 3000, 1},     {1, 20000, 3000},
                          {2, 1000, 999},  {1, 9000, 300},  {1, 33000, 1}};
  std::mt19937_64 random(7);
  int mismatches = 0;
  for (const Shape& shape : shapes) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (const int patterns : {kInfinities, kNeighbours, 0, 1, 2, 40}) {
        const int flags = static_cast<int>(random() % 16);
        const Order order{(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0};
        const bool strided = random() % 3 == 0;
        const bool with_nan = random() % 2 == 0;  // nearly every long row of random bits has one
        Check check(kernels, static_cast<Dtype>(dtype), shape, order, strided, patterns, with_nan,
                    random);
        ++(*cases)["topk"];
        ++(*cases)["codes_to_dense"];
        if (check.run(1 + static_cast<int>(random() % 3))) continue;
        ++mismatches;
        std::printf(
            "MISMATCH topk: rows %ld n %ld k %ld dtype %d flags %d strided %d patterns %d nan %d\n",
            static_cast<long>(shape.rows), static_cast<long>(shape.n), static_cast<long>(shape.k),
            dtype, flags, strided, patterns, with_nan);
      }
    }
  }
  return mismatches;
}

const Checks kChecks(check_topk);

}  // namespace

}  // namespace sparsekern::cpu
