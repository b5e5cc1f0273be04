// The float32 scores of the candidates of each row.
#include <cmath>

#include "cuda/common/teams.cuh"
#include "cuda/kernels.h"

namespace sparsekern::cuda {

namespace {

struct Scoring {
  const float* x;  // [rows, d]
  int64_t d;
  const float* weight;
  int64_t stride_n, stride_d;
  const float* bias;   // null or [n]
  const float* scale;  // null or [n]
  const int32_t* latents;
  const int32_t* counts;
  int64_t capacity, columns;
  float* scores;
};

// The sum of a lane's products, in the order of the features; four neighbouring ones at a time
// where the rows can be read so.
template <bool kVector>
__device__ float dot_of_lane(const Scoring& p, const float* x, const float* weight, int lane) {
  float sum = 0;
  if constexpr (kVector) {
    constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(float));
#pragma unroll 4
    for (int64_t f = lane * kCount; f < p.d; f += kWarp * kCount) {
      Pack<float, kCount> a, w;
      a.load(x + f);
      w.load(weight + f);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum = fmaf(a.item[c], w.item[c], sum);
    }
  } else {
#pragma unroll 4
    for (int64_t f = lane; f < p.d; f += kWarp) sum = fmaf(x[f], weight[f * p.stride_d], sum);
  }
  return sum;
}

// A block owns a row of x, which stays in the first cache, and a warp one candidate after the
// other. Every dot product is added in the same order, wherever its candidate stands. Bound by
// reading the candidates' rows of the weight, d numbers each, from the L2 cache.
template <bool kVector>
__global__ void __launch_bounds__(kBlockThreads) score_candidates_kernel(Scoring p) {
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % kWarp;
  const int32_t* latents = p.latents + b * p.capacity;
  float* scores = p.scores + b * p.columns;
  const int64_t count = p.counts[b] < p.columns ? p.counts[b] : p.columns;
  for (int64_t j = threadIdx.x / kWarp; j < p.columns; j += kBlockWarps) {
    float score = -INFINITY;
    if (j < count) {
      const int64_t latent = latents[j];
      score =
          warp_sum(dot_of_lane<kVector>(p, p.x + b * p.d, p.weight + latent * p.stride_n, lane));
      if (p.bias != nullptr) score += p.bias[latent];
      if (p.scale != nullptr) score *= p.scale[latent];
    }
    if (lane == 0) scores[j] = score;
  }
}

}  // namespace

void score_candidates(const ScoreCandidatesArguments& call, cudaStream_t stream) {
  const Matrix &x = call.x, &weight = call.weight;
  const Scoring p{static_cast<const float*>(x.data),
                  x.columns,
                  static_cast<const float*>(weight.data),
                  weight.row_stride,
                  weight.column_stride,
                  call.bias,
                  call.scale,
                  call.latents,
                  call.counts,
                  call.capacity,
                  call.columns,
                  call.scores};
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(float));
  const bool vector = p.stride_d == 1 && packs_fit<kCount>(p.x, p.d, p.d) &&
                      packs_fit<kCount>(p.weight, p.stride_n, p.d);
  launch(vector ? score_candidates_kernel<true> : score_candidates_kernel<false>, grid_of(x.rows),
         kBlockThreads, 0, stream, p);
}

}  // namespace sparsekern::cuda
