// The C++ types behind the dtypes: the one place that finds them.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/common/launch.cuh"
#include "interface/dtypes.h"

namespace sparsekern::cuda {

// Calls visit(T()) with the type behind a dtype. `function` is for the message.
template <class Visit>
void visit_dtype(const char* function, Dtype dtype, Visit&& visit) {
  switch (dtype) {
    case kFloat32:
      return visit(float());
    case kBFloat16:
      return visit(__nv_bfloat16());
    case kFloat16:
      return visit(__half());
    case kFloat64:
      throw std::runtime_error(std::string(function) + ": the CUDA kernels have no float64");
  }
  throw std::runtime_error(std::string(function) + ": there is no dtype number " +
                           std::to_string(static_cast<int>(dtype)));
}

// Calls visit(Values(), Weight()): a weight has the dtype of the values, or float32.
template <class Visit>
void visit_dtypes(const char* function, Dtype dtype, Dtype weight_dtype, Visit&& visit) {
  visit_dtype(function, dtype, [&](auto value) {
    if (weight_dtype == dtype) return visit(value, value);
    if constexpr (sizeof(value) == 2) {
      if (weight_dtype == kFloat32) return visit(value, float());
    }
    throw std::runtime_error(std::string(function) +
                             ": the weight must have the values' dtype or float32, got number " +
                             std::to_string(static_cast<int>(weight_dtype)));
  });
}

}  // namespace sparsekern::cuda
