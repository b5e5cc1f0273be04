// The C++ types behind the dtypes: the one place that finds them.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/simd/lanes.h"
#include "interface/dtypes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Calls visit(Stored{}) with the type behind a dtype. `function` is for the message.
template <class Visit>
void visit_dtype(const char* function, Dtype dtype, Visit&& visit) {
  switch (dtype) {
    case kFloat32:
      return visit(float{});
    case kBFloat16:
      return visit(BFloat16{});
    case kFloat16:
      return visit(Float16{});
    case kFloat64:
      return visit(double{});
  }
  throw std::runtime_error(std::string(function) + ": there is no dtype number " +
                           std::to_string(static_cast<int>(dtype)));
}

// Calls visit(Values{}, Weight{}): a weight has the dtype of the values, or float32 beside 16 bits.
template <class Visit>
void visit_dtypes(const char* function, Dtype dtype, Dtype weight_dtype, Visit&& visit) {
  visit_dtype(function, dtype, [&](auto value) {
    if (weight_dtype == dtype) return visit(value, value);
    if constexpr (sizeof(value) == 2) {
      if (weight_dtype == kFloat32) return visit(value, float{});
    }
    throw std::runtime_error(std::string(function) +
                             ": the weight must have the values' dtype or float32, got number " +
                             std::to_string(static_cast<int>(weight_dtype)));
  });
}

// Returns visit(typed pointer) for the type of the indices.
template <class Visit>
auto visit_indices(const char* function, const void* indices, IndexType type, Visit&& visit) {
  if (type == kInt64) return visit(static_cast<const int64_t*>(indices));
  if (type == kInt32) return visit(static_cast<const int32_t*>(indices));
  throw std::runtime_error(std::string(function) + ": there is no dtype of indices number " +
                           std::to_string(static_cast<int>(type)));
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
