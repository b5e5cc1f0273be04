// Top-k and dense codes under the emulation, against a sort by value and index.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/common/packs.cuh"
#include "cuda/topk/regimes.h"
#include "tests/emulation/driver.h"

namespace {

namespace cuda = sparsekern::cuda;

constexpr int64_t kBytes[] = {4, 2, 2};
const char* const kTypes[] = {"float32", "bfloat16", "float16"};
constexpr unsigned char kPoison = 0xa5;

enum class Way { topk, small, shared, warps, candidates, sliced, digits, by_warps, by_blocks };
const char* const kWays[] = {"topk",   "short",  "shared",       "warps",        "candidates",
                             "sliced", "digits", "warps update", "blocks update"};

enum class Fill {
  normal,
  ties,
  constant,
  lowest,
  nans,
  zeros,
  sparse,
  ascending,
  descending,
  tail,
  late,
  count
};
const char* const kFills[] = {"normal", "ties",      "constant",   "lowest", "nans", "zeros",
                              "sparse", "ascending", "descending", "tail",   "late"};

enum class Layout { contiguous, shifted, padded, transposed, expanded, count };
const char* const kLayouts[] = {"contiguous", "shifted", "padded", "transposed", "expanded"};

struct Case {
  Way way;
  int64_t rows, n, k;
  sparsekern::Dtype dtype = sparsekern::kFloat32;
  bool sorted = false, relu = false, abs = false;
  Fill fill = Fill::normal;
  Layout layout = Layout::contiguous;
  bool masked = false, counts = false, smallest = false;
};

float read(const unsigned char* p, int dtype) {
  float f;
  __nv_bfloat16 b;
  __half h;
  std::memcpy(dtype == 0   ? static_cast<void*>(&f)
              : dtype == 1 ? static_cast<void*>(&b)
                           : &h,
              p, kBytes[dtype]);
  return dtype == 0 ? f : dtype == 1 ? __bfloat162float(b) : __half2float(h);
}

void write(unsigned char* p, int dtype, float f) {
  const __nv_bfloat16 b = __float2bfloat16(f);
  const __half h = __float2half(f);
  std::memcpy(p,
              dtype == 0   ? static_cast<const void*>(&f)
              : dtype == 1 ? static_cast<const void*>(&b)
                           : &h,
              kBytes[dtype]);
}

// The i-th of n numbers of a row. NaNs and zeros of both signs are there bit by bit.
float number(Fill fill, int64_t i, int64_t n, std::mt19937& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto draw = [&](int count) { return static_cast<int>(random() % count); };
  const float normal = std::normal_distribution<float>()(random);
  switch (fill) {
    case Fill::ties:
      return static_cast<float>(draw(5) - 2);
    case Fill::constant:
      return 0.5f;
    case Fill::lowest:
      return -kInfinity;
    case Fill::nans: {
      const float special[] = {std::copysign(NAN, 1.0f), std::copysign(NAN, -1.0f), kInfinity,
                               -kInfinity};
      return draw(8) == 0 ? special[draw(4)] : normal;
    }
    case Fill::zeros:
      return draw(20) == 0 ? normal : draw(2) == 0 ? 0.0f : -0.0f;
    case Fill::sparse:
      return draw(50) == 0 ? normal : 0.0f;
    case Fill::ascending:
      return static_cast<float>(i) / static_cast<float>(n);
    case Fill::descending:
      return -static_cast<float>(i) / static_cast<float>(n);
    case Fill::tail:  // the largest are in the last eighth, ties before them
      return i >= n - n / 8 ? 10.0f + normal : static_cast<float>(draw(2));
    case Fill::late:  // a NaN and the smallest subnormal at the end of zeros
      return i == n - 1 ? NAN : i == n - 2 ? 6e-8f : -0.0f;
    default:
      return normal;
  }
}

// x of a case: the numbers of its layout in a block of exactly the size they need.
struct Input {
  int64_t row_stride, col_stride, shift = 0;
  std::vector<unsigned char> bytes;

  explicit Input(const Case& c) : row_stride(c.n), col_stride(1) {
    if (c.layout == Layout::shifted) shift = 1;
    if (c.layout == Layout::padded) row_stride = c.n + 16 - c.n % 16;
    if (c.layout == Layout::transposed) row_stride = 1, col_stride = c.rows;
    if (c.layout == Layout::expanded) row_stride = 0;
    const int64_t size = (c.rows - 1) * row_stride + (c.n - 1) * col_stride + 1 + shift;
    bytes.assign(size * kBytes[c.dtype], 0);
    std::mt19937 random(static_cast<unsigned>(c.n * 31 + c.k));
    for (int64_t b = 0; b < c.rows; ++b) {
      for (int64_t i = 0; i < c.n; ++i) {
        const float x = number(c.fill, i, c.n, random);
        if (b == 0 || row_stride != 0) write(at(c, b, i), c.dtype, x);
      }
    }
  }
  unsigned char* data(const Case& c) { return bytes.data() + shift * kBytes[c.dtype]; }
  unsigned char* at(const Case& c, int64_t b, int64_t i) {
    return data(c) + (b * row_stride + i * col_stride) * kBytes[c.dtype];
  }
};

struct Output {
  std::vector<unsigned char> values, masked;
  std::vector<int64_t> indices, counts;

  explicit Output(const Case& c)
      : values(c.rows * c.k * kBytes[c.dtype], kPoison),
        masked(c.masked ? c.rows * c.n * kBytes[c.dtype] : 0, kPoison),
        indices(c.rows * c.k, -1),
        counts(c.counts ? c.n : 0, 0) {}
};

// The columns that a row's codes name. NaN stands before +infinity; the first of equals wins.
std::vector<int64_t> selected(const Case& c, Input& input, int64_t b) {
  std::vector<std::tuple<bool, float, int64_t>> row(c.n);
  for (int64_t i = 0; i < c.n; ++i) {
    const float x = read(input.at(c, b, i), c.dtype);
    const bool nan = std::isnan(x);
    const float value = nan ? 0 : c.abs ? std::fabs(x) : x;
    row[i] = c.smallest ? std::make_tuple(nan, value, i) : std::make_tuple(!nan, -value, i);
  }
  std::partial_sort(row.begin(), row.begin() + c.k, row.end());
  std::vector<int64_t> order;
  for (int64_t j = 0; j < c.k; ++j) order.push_back(std::get<2>(row[j]));
  if (!c.sorted) std::sort(order.begin(), order.end());
  return order;
}

Output expected(const Case& c, Input& input) {
  Output out(c);
  std::fill(out.masked.begin(), out.masked.end(), 0);
  const int64_t bytes = kBytes[c.dtype];
  for (int64_t b = 0; b < c.rows; ++b) {
    const std::vector<int64_t> order = selected(c, input, b);
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t i = order[j];
      unsigned char stored[4] = {};
      const float value = read(input.at(c, b, i), c.dtype);
      const bool cleared = c.relu && value <= 0;
      if (!cleared) std::memcpy(stored, input.at(c, b, i), bytes);
      out.indices[b * c.k + j] = i;
      std::memcpy(&out.values[(b * c.k + j) * bytes], stored, bytes);
      if (c.masked) std::memcpy(&out.masked[(b * c.n + i) * bytes], stored, bytes);
      if (c.counts) out.counts[i] += !cleared && value != 0;
    }
  }
  return out;
}

Output computed(const Case& c, Input& input) {
  Output out(c);
  cuda::Slices slices = c.way == Way::topk
                            ? cuda::slices_for(c.rows, c.n)
                            : cuda::Slices{1, (c.n / cuda::kSliceStep + 1) * cuda::kSliceStep};
  if (c.way == Way::sliced) {
    slices = {(c.n + cuda::kSliceStep - 1) / cuda::kSliceStep, cuda::kSliceStep};
  }
  void* masked = c.masked ? out.masked.data() : nullptr;
  int64_t* counts = c.counts ? out.counts.data() : nullptr;
  const sparsekern::TopkArguments arguments{
      {input.data(c), c.dtype, c.rows, c.n, input.row_stride, input.col_stride},
      c.k,
      c.sorted,
      c.relu,
      c.abs,
      out.values.data(),
      out.indices.data(),
      masked,
      counts,
      c.smallest};
  int64_t needed = cuda::topk_workspace(arguments);
  if (c.way == Way::candidates || c.way == Way::sliced) {
    needed = cuda::candidates_workspace(c.rows, slices.count, c.k);
  } else if (c.way == Way::digits) {
    needed = cuda::sort_workspace(c.rows, c.k);
  }
  std::vector<unsigned char> workspace(needed, kPoison);
  const cuda::TopkCall call{arguments, workspace.data(), nullptr};
  switch (c.way) {
    case Way::topk:
      cuda::topk(arguments, workspace.data(), nullptr);
      break;
    case Way::small:
      cuda::topk_short(call);
      break;
    case Way::shared:
      cuda::topk_shared(call);
      break;
    case Way::warps:
      cuda::topk_candidates_of_warps(call);
      break;
    case Way::candidates:
    case Way::sliced:
      cuda::topk_candidates(call, slices);
      break;
    case Way::digits:
      cuda::topk_digits(call);
      break;
    case Way::by_warps:
    case Way::by_blocks:  // see updated
      break;
  }
  return out;
}

// A third of the columns, or k, by the way of every day; the others come in three parts.
Output updated(const Case& c, Input& input) {
  const int64_t cut = std::max(c.k, c.n / 3);
  Case before = c;
  before.way = Way::topk;
  before.relu = false;
  before.n = cut;
  const Output codes = computed(before, input);
  Output out(c);
  std::vector<int64_t> state(c.rows * (1 + 2 * c.k), -1);
  const int64_t step = (c.n - cut + 2) / 3;
  for (int64_t first = cut; first < c.n; first += step) {
    const int64_t end = std::min(first + step, c.n);
    const void* values = first == cut ? codes.values.data() : nullptr;
    const bool last = end == c.n;
    const sparsekern::TopkUpdateArguments arguments{
        {input.at(c, 0, first), c.dtype, c.rows, end - first, input.row_stride, input.col_stride},
        first,
        c.k,
        {values, c.dtype, codes.indices.data(), sparsekern::kInt64, c.rows, c.k},
        state.data(),
        c.relu && last,
        last ? out.values.data() : nullptr,
        last ? out.indices.data() : nullptr};
    if (c.way == Way::by_warps) {
      cuda::topk_update_of_warps(arguments, nullptr);
    } else {
      cuda::topk_update_of_blocks(arguments, nullptr);
    }
  }
  return out;
}

// Codes made dense must be the masked row.
bool dense_agrees(const Case& c, const Output& codes) {
  std::vector<unsigned char> dense(c.rows * c.n * kBytes[c.dtype], kPoison);
  const sparsekern::Codes list{codes.values.data(), c.dtype, codes.indices.data(),
                               sparsekern::kInt64,  c.rows,  c.k};
  cuda::codes_to_dense({list, c.n, dense.data()}, nullptr);
  return dense == codes.masked;
}

// Makes every NaN among the values the same one.
void make_nans_equal(const Case& c, std::vector<unsigned char>* values) {
  for (size_t at = 0; at < values->size(); at += kBytes[c.dtype]) {
    if (std::isnan(read(&(*values)[at], c.dtype))) write(&(*values)[at], c.dtype, NAN);
  }
}

int check(const Case& c, int* cases) {
  ++*cases;
  Input input(c);
  Output wanted = expected(c, input);
  const bool update = c.way == Way::by_warps || c.way == Way::by_blocks;
  Output got = update ? updated(c, input) : computed(c, input);
  if (update) {
    make_nans_equal(c, &wanted.values);
    make_nans_equal(c, &got.values);
  }
  std::string wrong;
  if (got.indices != wanted.indices) wrong += " indices";
  if (got.values != wanted.values) wrong += " values";
  if (got.masked != wanted.masked) wrong += " masked";
  if (got.counts != wanted.counts) wrong += " counts";
  if (c.masked && !dense_agrees(c, wanted)) wrong += " dense";
  if (wrong.empty()) return 0;
  std::printf(
      "topk: %s %s rows %lld n %lld k %lld sorted %d relu %d abs %d smallest %d %s %s: wrong%s\n",
      kWays[static_cast<int>(c.way)], kTypes[c.dtype], static_cast<long long>(c.rows),
      static_cast<long long>(c.n), static_cast<long long>(c.k), c.sorted, c.relu, c.abs, c.smallest,
      kFills[static_cast<int>(c.fill)], kLayouts[static_cast<int>(c.layout)], wrong.c_str());
  return 1;
}

// Codes outside the row are left out, on both sides of a tile's edge as well.
int check_dense(int* cases) {
  ++*cases;
  constexpr int64_t kColumns = 20000;
  const std::vector<int64_t> indices = {-1, kColumns, 0, 16383, 16384, kColumns - 1, 1 - kColumns};
  std::vector<float> values(indices.size()), dense(kColumns, NAN), wanted(kColumns, 0.0f);
  for (size_t j = 0; j < indices.size(); ++j) {
    values[j] = static_cast<float>(j + 1);
    if (indices[j] >= 0 && indices[j] < kColumns) wanted[indices[j]] = values[j];
  }
  const int64_t count = static_cast<int64_t>(indices.size());
  const sparsekern::Codes list{
      values.data(), sparsekern::kFloat32, indices.data(), sparsekern::kInt64, 1, count};
  cuda::codes_to_dense({list, kColumns, dense.data()}, nullptr);
  if (dense == wanted) return 0;
  std::printf("topk: codes outside the row: wrong dense\n");
  return 1;
}

struct Shape {
  Way way;
  int64_t rows, n, k;
};

// Every way with k = 1, k = n where it may be, sizes one above a boundary; what only the public
// function decides is asked of it.
const Shape kShapes[] = {
    {Way::small, 5, 1, 1},           {Way::small, 4, 37, 37},
    {Way::small, 9, 129, 8},         {Way::small, 3, 513, 130},
    {Way::small, 2, 2048, 64},       {Way::small, 1, 2047, 2047},
    {Way::shared, 1, 257, 257},      {Way::shared, 2, 4097, 513},
    {Way::shared, 1, 9000, 4096},    {Way::shared, 1, 5000, 1},
    {Way::warps, 3, 100, 100},       {Way::warps, 9, 300, 128},
    {Way::warps, 9, 4097, 1},        {Way::warps, 2, 2049, 128},
    {Way::warps, 5, 13001, 64},      {Way::warps, 2, 16384, 32},
    {Way::candidates, 2, 300, 300},  {Way::candidates, 1, 4097, 1},
    {Way::candidates, 2, 13001, 64}, {Way::candidates, 1, 20480, 512},
    {Way::candidates, 3, 4096, 300}, {Way::sliced, 2, 12289, 64},
    {Way::sliced, 1, 20001, 512},    {Way::sliced, 1, 8200, 1},
    {Way::digits, 2, 255, 17},       {Way::digits, 1, 5001, 5001},
    {Way::digits, 1, 9001, 4096},    {Way::digits, 2, 13000, 9000},
    {Way::digits, 1, 2049, 1},       {Way::topk, 3, 2049, 40},
    {Way::topk, 1, 40961, 33},       {Way::topk, 1, 33000, 600},
    {Way::topk, 7, 512, 32},         {Way::topk, 1, 17000, 4100},
    {Way::topk, 264, 16384, 4},      {Way::topk, 2112, 2049, 3},
    {Way::by_warps, 3, 300, 128},    {Way::by_warps, 9, 13001, 64},
    {Way::by_warps, 2, 8192, 1},     {Way::by_warps, 2, 100, 99},
    {Way::by_blocks, 2, 13001, 64},  {Way::by_blocks, 1, 20480, 512},
    {Way::by_blocks, 2, 700, 300},   {Way::by_blocks, 1, 4097, 1},
};

int check_topk(int* cases) {
  int failures = check_dense(cases);
  int turn = 0;
  for (const Shape& shape : kShapes) {
    const bool heavy = shape.rows * shape.n > 1000000;
    for (int fill = 0; fill < (heavy ? 1 : static_cast<int>(Fill::count)); ++fill) {
      ++turn;
      if (sparsekern::emulation::quick && (heavy || turn % 3 != 0)) continue;
      Case c{shape.way, shape.rows, shape.n, shape.k};
      c.fill = static_cast<Fill>(fill);
      // Turns that share no factor with the number of fills, so that all combinations come up.
      c.dtype = static_cast<sparsekern::Dtype>(turn % 3);
      const int flags = turn * 5 % 8;
      c.sorted = (flags & 1) != 0;
      c.relu = (flags & 2) != 0;
      c.abs = (flags & 4) != 0;
      c.layout = static_cast<Layout>(turn % static_cast<int>(Layout::count));
      c.smallest = c.way == Way::topk && turn % 2 == 0;
      c.masked = turn % 4 < 2 && !c.smallest;
      c.counts = turn % 7 < 4;
      if (shape.way == Way::by_warps || shape.way == Way::by_blocks) {
        c.sorted = c.abs = c.masked = c.counts = false;
      }
      failures += check(c, cases);
    }
  }
  return failures;
}

const sparsekern::emulation::Checks kChecks("topk", check_topk);

}  // namespace
