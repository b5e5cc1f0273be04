// Which latents may be among the k first of a row, by scores that are known up to an error. The
// same as on the CPU (csrc/cpu/linear_topk/screen_scores.cpp), with a block for each row.
#include <cmath>

#include "cuda/topk/bound.cuh"

namespace sparsekern::cuda {

namespace {

// Neighbouring scores that a thread compares before the candidates of the block are taken.
constexpr int kHeld = 4;
constexpr int kChunk = kHeld * kBlockThreads;
// Groups of scores of a thread, whose largest lower bounds prove a first threshold.
constexpr int kGroupsHeld = 16;
constexpr int kGroups = kGroupsHeld * kBlockThreads;
// |bias| beyond which its own rounding is bounded by this: -inf + inf would be NaN.
constexpr float kLargestBiasError = 1e38f;

// What the rows of a slice share.
template <class Stored>
struct Slice {
  const Stored* scores;
  int64_t row_stride;
  int first, width, k, capacity;
  const float* bias;     // null or [width]
  const float* scale;    // null or [width]
  const float* lengths;  // [width]
  const float* errors;   // [width]
  float score_error, bias_error, least_error;
  bool last;
  const float* x_errors;
  const float* x_lengths;
  int32_t* latents;
  float* lower;
  float* upper;
  int32_t* counts;
  float* thresholds;
};

// What all threads know of a row's candidates. In registers: nothing takes its address.
struct State {
  int count;
  float threshold;  // NaN: there are fewer than k
};

// The candidates of a row.
struct List {
  int32_t* latents;
  float* lower;
  float* upper;
};

struct Bounds {
  float lower, upper;
};

// A row of a slice.
template <class Stored>
struct Row {
  const Slice<Stored>& p;
  const Stored* scores;
  float x_error, x_length;

  __device__ Bounds bounds(int i) const {
    float a = to_float(scores[i]);
    float r = fmaf(x_error, p.lengths[i], p.least_error);
    r = fmaf(x_length, p.errors[i], r);
    r = fmaf(p.score_error, fabsf(a), r);
    if (p.bias != nullptr) {
      const float bias = p.bias[i];
      a += bias;
      r += fminf(fabsf(bias) * p.bias_error, kLargestBiasError);
    }
    if (p.scale != nullptr) {
      const float scale = p.scale[i];
      a *= scale;
      r = fmaf(r, fabsf(scale), p.least_error);
    }
    return {a - r, a + r};
  }
};

// Ascending with falling bounds; what is not a number comes last.
__device__ inline unsigned key_of_bound(float lower) {
  return key_of(lower == lower ? lower : -INFINITY, kSigned);
}

// Raises the threshold to the k-th largest lower bound and drops what cannot reach it any more. The
// list is in memory, of which each of some 30 steps reads the bounds: a few thousand at most.
__device__ __noinline__ State tighten(List list, State state, int k) {
  BlockReduce reduce;
  __syncthreads();  // ends the writes, and the reads of another reduction's slots
  const int count = state.count;
  if (count < k) return state;
  const auto count_to = [&](unsigned v) {
    int own = 0;
    for (int j = threadIdx.x; j < count; j += kBlockThreads) {
      own += key_of_bound(list.lower[j]) <= v;
    }
    return reduce.sum(own);
  };
  // Slack -1: down to the k-th bound itself, not only to a key between it and the next one.
  const float proved = number_of<float>(bisect(0, kNoKey, k, -1, count_to).key);
  const float threshold = proved < state.threshold ? state.threshold : proved;
  int reaching = 0, kept = 0;
  for (int base = 0; base < count; base += kBlockThreads) {
    const int j = base + static_cast<int>(threadIdx.x);
    const bool there = j < count;
    const int32_t latent = there ? list.latents[j] : 0;
    const float lower = there ? list.lower[j] : 0.0f, upper = there ? list.upper[j] : 0.0f;
    int total = 0;
    const int before = reaching + reduce.before(there && lower >= threshold, &total);
    reaching += total;
    // k latents before this one reach the threshold: with no more than it, this one comes after
    // them.
    const bool late = before >= k && upper == threshold;
    const bool keep = there && !late && !(upper < threshold);
    // All have read theirs when this is known: what is kept goes no further than what was read.
    const int place = kept + reduce.before(keep, &total);
    kept += total;
    if (keep) {
      list.latents[place] = latent;
      list.lower[place] = lower;
      list.upper[place] = upper;
    }
  }
  __syncthreads();
  return {kept, threshold};
}

// A threshold for a row without one: the k-th largest of the maxima of groups of lower bounds is
// reached by k latents. What equals it may come before them, so it is a step less. NaN: none was
// proved.
template <class Stored>
__device__ float proved_threshold(const Row<Stored>& row, BlockReduce& reduce) {
  const int width = row.p.width, k = row.p.k;
  const float none = __int_as_float(0x7fc00000);
  if (k > kGroups || k > width) return none;
  unsigned best[kGroupsHeld];
#pragma unroll
  for (int g = 0; g < kGroupsHeld; ++g) {
    best[g] = kNoKey;
    for (int i = g * kBlockThreads + threadIdx.x; i < width; i += kGroups) {
      const unsigned key = key_of_bound(row.bounds(i).lower);
      best[g] = key < best[g] ? key : best[g];
    }
  }
  const float proved = number_of<float>(bound_of(reduce, best, k, k / 8).key);
  return proved > -INFINITY ? nextafterf(proved, -INFINITY) : none;
}

// Appends what may matter of a chunk of scores; false when there are too many candidates.
template <class Stored>
__device__ bool take_chunk(const Row<Stored>& row, int base, const List& list, State& state,
                           BlockReduce& reduce) {
  const int k = row.p.k, capacity = row.p.capacity;
  const int first = base + static_cast<int>(threadIdx.x) * kHeld;
  Bounds bounds[kHeld];
  unsigned waiting = 0;  // a bit for each score
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (first + u >= row.p.width) continue;
    bounds[u] = row.bounds(first + u);
    waiting |= 1u << u;
  }
  while (true) {
    unsigned hits = 0;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if ((waiting >> u & 1) == 0) continue;
      hits |= static_cast<unsigned>(!(bounds[u].upper <= state.threshold)) << u;
    }
    int total = 0;
    int place = state.count + reduce.before(__popc(hits), &total);
    waiting = 0;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if ((hits >> u & 1) == 0) continue;
      if (place < capacity) {
        list.latents[place] = row.p.first + first + u;
        list.lower[place] = bounds[u].lower;
        list.upper[place] = bounds[u].upper;
      } else {
        waiting |= 1u << u;
      }
      ++place;
    }
    const bool all = state.count + total <= capacity;
    state.count = all ? state.count + total : capacity;
    if (all) return true;
    state = tighten(list, state, k);
    if (4 * state.count > 3 * capacity) return false;
  }
}

// A block owns a row. It reads the scores once from memory, those of a first slice a second time
// from a cache, and the lengths and errors of the latents, which all rows share, from a cache.
template <class Stored>
__global__ void __launch_bounds__(kBlockThreads) screen_scores_kernel(Slice<Stored> p) {
  const int64_t b = blockIdx.x;
  const int found = p.counts[b];
  if (found < 0) return;
  const List list{p.latents + b * p.capacity, p.lower + b * p.capacity, p.upper + b * p.capacity};
  State state{found, p.thresholds[b]};
  const Row<Stored> row{p, p.scores + b * p.row_stride, p.x_errors[b], p.x_lengths[b]};
  BlockReduce reduce;
  if (state.threshold != state.threshold) state.threshold = proved_threshold(row, reduce);
  const auto next_tightening = [&] {
    const int wished = 4 * p.k > 2 * state.count ? 4 * p.k : 2 * state.count;
    return wished < p.capacity ? wished : p.capacity;
  };
  int full = next_tightening();
  bool fits = true;
  for (int base = 0; fits && base < p.width; base += kChunk) {
    fits = take_chunk(row, base, list, state, reduce);
    if (!fits || state.count <= full) continue;
    state = tighten(list, state, p.k);
    full = next_tightening();
    fits = 4 * state.count <= 3 * p.capacity;
  }
  if (fits && p.last) state = tighten(list, state, p.k);
  if (threadIdx.x == 0) {
    p.counts[b] = fits ? state.count : -1;
    p.thresholds[b] = state.threshold;
  }
}

template <class Stored>
void screen(const ScreenScoresArguments& call, cudaStream_t stream) {
  const Slice<Stored> slice{static_cast<const Stored*>(call.scores.data),
                            call.scores.row_stride,
                            static_cast<int>(call.first),
                            static_cast<int>(call.scores.columns),
                            static_cast<int>(call.k),
                            static_cast<int>(call.capacity),
                            call.bias,
                            call.scale,
                            call.lengths,
                            call.errors,
                            call.score_error,
                            call.bias_error,
                            call.least_error,
                            call.last,
                            call.x_errors,
                            call.x_lengths,
                            call.latents,
                            call.lower,
                            call.upper,
                            call.counts,
                            call.thresholds};
  launch(screen_scores_kernel<Stored>, grid_of(call.scores.rows), kBlockThreads, 0, stream, slice);
}

}  // namespace

void screen_scores(const ScreenScoresArguments& call, cudaStream_t stream) {
  if (call.scores.dtype == kBFloat16) return screen<__nv_bfloat16>(call, stream);
  if (call.scores.dtype == kFloat32) return screen<float>(call, stream);
  throw std::runtime_error("screen_scores: scores must be float32 or bfloat16, got dtype number " +
                           std::to_string(static_cast<int>(call.scores.dtype)));
}

}  // namespace sparsekern::cuda
