// How channel_threshold divides its work, for channel_threshold.cu and for the tests.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"

namespace sparsekern::cuda {

struct ThresholdCall : ChannelThresholdArguments {
  void* workspace;
  cudaStream_t stream;
};

struct ThresholdPlan {
  bool runs;       // a block owns one channel, else neighbouring ones
  int64_t parts;   // blocks that share what one owns; 1: one launch, no workspace
  int64_t listed;  // room of a channel for what the first digit leaves over; 0 for none
};

ThresholdPlan plan_threshold(const ChannelTensor& x);
int64_t planned_workspace(const ThresholdPlan& plan, const ChannelTensor& x);
void channel_threshold(const ThresholdCall& call, const ThresholdPlan& plan);

}  // namespace sparsekern::cuda
