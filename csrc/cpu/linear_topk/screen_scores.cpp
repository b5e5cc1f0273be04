// Which latents may be among the k first of a row, by scores that are known up to an error.
//
// With a score a of a latent and a bound r of its error, the exact score lies in [a - r, a + r].
// The threshold of a row is the k-th largest a - r of the latents so far: k of them have exact
// scores of at least that. So a later latent, which loses against equal scores, matters only where
// a + r is above the threshold. Candidates are kept by ascending latent. A comparison with NaN
// never drops a candidate and never raises a threshold.
#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>

#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/comparisons.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

constexpr double kNanosecondsPerScore = 0.25;
// Scores that are compared before their candidates are taken.
constexpr int64_t kBlock = 64;
// Room that a list needs for these, and for what is written beyond the last.
constexpr int64_t kRoom = kBlock + kFloatLanes;
// Groups of scores for each of the k, whose maxima prove a first threshold. With four, some
// 1.15 k scores reach it.
constexpr int64_t kGroupsPerCode = 4;
// |bias| beyond which its own rounding is bounded by this: -inf + inf would be NaN.
constexpr float kLargestBiasError = 1e38f;

// What the rows of a slice share.
struct Slice {
  int64_t first, width, k, capacity;
  const float* bias;     // null or [width]
  const float* scale;    // null or [width]
  const float* lengths;  // [width]
  const float* errors;   // [width]
  float score_error, bias_error, least_error;
};

// The candidates of a row.
struct List {
  int32_t* latents;
  float* lower;
  float* upper;
  int64_t count;
  float threshold;  // NaN: there are fewer than k
};

// Two bounds of some neighbouring scores.
struct Bounds {
  FloatLanes lower, upper;
};

inline FloatLanes magnitude(FloatLanes x) { return (FloatLanes)((FloatBits)x & 0x7fffffffu); }

template <bool kAffine, class LoadAt, class Stored>
inline Bounds bounds_at(const Slice& p, const LoadAt& load_at, const Stored* scores,
                        FloatLanes x_error, FloatLanes x_length, int64_t i) {
  FloatLanes a = load_at(scores + i);
  FloatLanes r = multiply_add(x_error, load_at(p.lengths + i), broadcast(p.least_error));
  r = multiply_add(x_length, load_at(p.errors + i), r);
  r = multiply_add(broadcast(p.score_error), magnitude(a), r);
  if constexpr (kAffine) {
    if (p.bias != nullptr) {
      const FloatLanes bias = load_at(p.bias + i);
      const FloatLanes most = broadcast(kLargestBiasError);
      const FloatLanes error = magnitude(bias) * broadcast(p.bias_error);
      a += bias;
      r += error > most ? most : error;
    }
    if (p.scale != nullptr) {
      const FloatLanes scale = load_at(p.scale + i);
      a *= scale;
      r = multiply_add(r, magnitude(scale), broadcast(p.least_error));
    }
  }
  return {a - r, a + r};
}

// The k-th largest of `count` numbers, which it reorders.
inline float kth_largest(float* numbers, int64_t count, int64_t k) {
  std::nth_element(numbers, numbers + (k - 1), numbers + count, std::greater<float>());
  return numbers[k - 1];
}

// Raises the threshold to the k-th largest lower bound and drops what cannot reach it any more.
void tighten(List* list, int64_t k, float* scratch) {
  if (list->count < k) return;
  for (int64_t j = 0; j < list->count; ++j) {
    scratch[j] = list->lower[j] == list->lower[j] ? list->lower[j] : -INFINITY;
  }
  const float proved = kth_largest(scratch, list->count, k);
  const float threshold = proved < list->threshold ? list->threshold : proved;
  int64_t reaching = 0, kept = 0;
  for (int64_t j = 0; j < list->count; ++j) {
    // k latents before this one reach the threshold: with no more than it, this one comes after
    // them
    const bool late = reaching >= k && list->upper[j] == threshold;
    reaching += list->lower[j] >= threshold;
    if (late || list->upper[j] < threshold) continue;
    list->latents[kept] = list->latents[j];
    list->lower[kept] = list->lower[j];
    list->upper[kept] = list->upper[j];
    ++kept;
  }
  list->count = kept;
  list->threshold = threshold;
}

// A threshold for the first slice of a row: the k-th largest of the maxima of groups of lower
// bounds is reached by k latents. What equals it may come before them, so it is a step less.
template <bool kAffine, class Stored>
void prove_threshold(const Slice& p, const Stored* scores, FloatLanes x_error, FloatLanes x_length,
                     List* list, float* scratch) {
  const int64_t vectors = (kGroupsPerCode * p.k + kFloatLanes - 1) / kFloatLanes;
  if (2 * vectors * kFloatLanes > p.width) return;
  const auto whole = [](auto* x) { return load(x); };
  for (int64_t v = 0; v < vectors; ++v) {
    store(scratch + v * kFloatLanes, broadcast(-INFINITY));
  }
  float* maxima = scratch;
  for (int64_t i = 0; i + kFloatLanes <= p.width; i += kFloatLanes) {
    const Bounds bounds = bounds_at<kAffine>(p, whole, scores, x_error, x_length, i);
    store(maxima, larger(bounds.lower, load(maxima)));  // the second where the first is NaN
    maxima += kFloatLanes;
    if (maxima == scratch + vectors * kFloatLanes) maxima = scratch;
  }
  const float proved = kth_largest(scratch, vectors * kFloatLanes, p.k);
  if (proved > -INFINITY) list->threshold = std::nextafter(proved, -INFINITY);
}

// One row of a slice; false when there are too many candidates.
template <bool kAffine, class Stored>
bool screen_row(const Slice& p, const Stored* scores, float x_error, float x_length, List* list,
                float* scratch) {
  const FloatLanes error = broadcast(x_error), length = broadcast(x_length);
  const auto whole = [](auto* x) { return load(x); };
  IntLanes lanes;
  for (int lane = 0; lane < kFloatLanes; ++lane) lanes[lane] = lane;
  const auto take = [&](const Bounds& bounds, uint32_t hits, int64_t i) {
    if (hits == 0) return;
    const int64_t count = list->count;
    const IntLanes latents = lanes + broadcast(static_cast<int32_t>(p.first + i));
    store_chosen(reinterpret_cast<int32_t*>(list->lower + count), (IntLanes)bounds.lower, hits);
    store_chosen(reinterpret_cast<int32_t*>(list->upper + count), (IntLanes)bounds.upper, hits);
    list->count += store_chosen(list->latents + count, latents, hits);
  };
  const auto next_tightening = [&] {
    return std::min(p.capacity - kRoom, std::max(4 * p.k, 2 * list->count));
  };
  int64_t full = next_tightening();
  const auto make_room = [&] {
    if (list->count <= full) return true;
    tighten(list, p.k, scratch);
    full = next_tightening();
    return 4 * list->count <= 3 * p.capacity;
  };
  if (list->threshold != list->threshold) {
    prove_threshold<kAffine>(p, scores, error, length, list, scratch);
  }
  int64_t i = 0;
  for (; i + kBlock <= p.width; i += kBlock) {
    const FloatLanes threshold = broadcast(list->threshold);
    Bounds bounds[kBlock / kFloatLanes];
    uint32_t hits[kBlock / kFloatLanes], any = 0;
    for (int v = 0; v < kBlock / kFloatLanes; ++v) {
      bounds[v] = bounds_at<kAffine>(p, whole, scores, error, length, i + v * kFloatLanes);
      hits[v] = reaching<Comparison::kNotLessEqual>(bounds[v].upper, threshold);
      any |= hits[v];
    }
    if (any == 0) continue;
    for (int v = 0; v < kBlock / kFloatLanes; ++v) take(bounds[v], hits[v], i + v * kFloatLanes);
    if (!make_room()) return false;
  }
  for (; i < p.width; i += kFloatLanes) {
    const int64_t left = std::min<int64_t>(kFloatLanes, p.width - i);
    const auto partial = [left](auto* x) { return load_partial(x, left); };
    const Bounds bounds = bounds_at<kAffine>(p, partial, scores, error, length, i);
    const uint32_t hits =
        reaching<Comparison::kNotLessEqual>(bounds.upper, broadcast(list->threshold));
    take(bounds, hits & ((uint32_t{1} << left) - 1), i);
    if (!make_room()) return false;
  }
  return true;
}

template <class Stored>
void screen(const ScreenScoresArguments& call, const Slice& p, int threads) {
  const int64_t rows = call.scores.rows;
  const double work = kNanosecondsPerScore * static_cast<double>(rows * p.width);
  const int team = useful_threads(rows < threads ? static_cast<int>(rows) : threads, work);
  const Buffer<float> scratch(team * p.capacity);
  deal_out(team, rows, 1, [&](int64_t b, int member) {
    if (call.counts[b] < 0) return;
    const auto* scores = static_cast<const Stored*>(call.scores.data) + b * call.scores.row_stride;
    float* own = scratch.get() + member * p.capacity;
    List list{call.latents + b * p.capacity, call.lower + b * p.capacity,
              call.upper + b * p.capacity, call.counts[b], call.thresholds[b]};
    const bool affine = p.bias != nullptr || p.scale != nullptr;
    const bool fits =
        affine ? screen_row<true>(p, scores, call.x_errors[b], call.x_lengths[b], &list, own)
               : screen_row<false>(p, scores, call.x_errors[b], call.x_lengths[b], &list, own);
    if (fits && call.last) tighten(&list, p.k, own);
    call.counts[b] = fits ? static_cast<int32_t>(list.count) : -1;
    call.thresholds[b] = list.threshold;
  });
}

}  // namespace

void screen_scores(const ScreenScoresArguments& call, int threads) {
  const KeepDenormals mode;
  const Slice slice{call.first,       call.scores.columns, call.k,          call.capacity,
                    call.bias,        call.scale,          call.lengths,    call.errors,
                    call.score_error, call.bias_error,     call.least_error};
  if (call.scores.dtype == kBFloat16) return screen<BFloat16>(call, slice, threads);
  if (call.scores.dtype == kFloat32) return screen<float>(call, slice, threads);
  throw std::runtime_error("screen_scores: scores must be float32 or bfloat16, got dtype number " +
                           std::to_string(static_cast<int>(call.scores.dtype)));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
