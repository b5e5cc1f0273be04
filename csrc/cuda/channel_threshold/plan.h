// How channel_threshold divides its work, for channel_threshold.cu and for the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

struct ThresholdCall {
  const void* x;
  int dtype;
  int64_t outer, channels, inner, rank;
  void* thresholds;
  void* workspace;
  cudaStream_t stream;
};

struct ThresholdPlan {
  bool runs;       // a block owns one channel, else neighbouring ones
  int64_t parts;   // blocks that share what one owns; 1: one launch, no workspace
  int64_t listed;  // room of a channel for what the first digit leaves over; 0 for none
};

ThresholdPlan plan_threshold(int64_t outer, int64_t channels, int64_t inner, int dtype);
int64_t planned_workspace(const ThresholdPlan& plan, int64_t channels, int dtype);
void channel_threshold(const ThresholdCall& call, const ThresholdPlan& plan);

}  // namespace sparsekern::cuda
