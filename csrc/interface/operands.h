// The operands that kernels share. sparsekern/dispatch/launch.py makes them of tensors, as tuples
// of the same fields in the same order. Addresses are of the device's memory; null: not given.
#pragma once

#include <cstdint>

#include "interface/dtypes.h"

namespace sparsekern {

// Element (i, j) lies at data + i * row_stride + j * column_stride, in elements.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// A contiguous tensor [outer, channels, inner].
struct ChannelTensor {
  void* data;
  Dtype dtype;
  int64_t outer, channels, inner;

  int64_t count() const { return outer * channels * inner; }
};

// Values with the index of each, both [rows, k], contiguous. Flat lists of codes are one row.
struct Codes {
  const void* values;
  Dtype dtype;
  const void* indices;
  IndexType index_type;
  int64_t rows, k;

  int64_t count() const { return rows * k; }
};

// Indices without their values, [count].
struct IndexList {
  const void* data;
  IndexType type;
  int64_t count;
};

}  // namespace sparsekern
