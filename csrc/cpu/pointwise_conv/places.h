// The codes of a sparse 1x1 convolution, ready to be taken row by row, and its weight.
#pragma once

#include "cpu/common/buffer.h"
#include "cpu/common/channels.h"
#include "cpu/common/parallel.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Where a code stands; `code` is its number among those that came.
struct Place {
  int64_t channel, outer, inner, code;
};

// The codes of each outer place, in the order in which they came.
class Places {
 public:
  template <class Index>
  Places(const Index* indices, int64_t count, const ChannelShape& shape)
      : count_(count), offsets_(shape.outer + 1), places_(count) {
    const int64_t period = shape.channels * shape.inner;
    std::memset(offsets_.get(), 0, static_cast<size_t>(shape.outer + 1) * sizeof(int64_t));
    for (int64_t m = 0; m < count; ++m) ++offsets_.get()[indices[m] / period + 1];
    for (int64_t o = 0; o < shape.outer; ++o) offsets_.get()[o + 1] += offsets_.get()[o];
    // Each code takes the next place of its outer place, whose offset then is the next one's; they
    // are moved back afterwards.
    for (int64_t m = 0; m < count; ++m) {
      const int64_t index = indices[m];
      const int64_t o = index / period;
      const int64_t channel = index / shape.inner % shape.channels;
      places_.get()[offsets_.get()[o]++] = {channel, o, index % shape.inner, m};
    }
    for (int64_t o = shape.outer; o > 0; --o) offsets_.get()[o] = offsets_.get()[o - 1];
    offsets_.get()[0] = 0;
  }

  // All of them, and those of one outer place.
  int64_t count() const { return count_; }
  const Place* begin() const { return places_.get(); }
  const Place* end() const { return places_.get() + count_; }
  int64_t count(int64_t outer) const { return offsets_.get()[outer + 1] - offsets_.get()[outer]; }
  const Place* begin(int64_t outer) const { return places_.get() + offsets_.get()[outer]; }
  const Place* end(int64_t outer) const { return begin(outer + 1); }

 private:
  int64_t count_;
  Buffer<int64_t> offsets_;
  Buffer<Place> places_;
};

// weight [outputs, channels] of any strides.
template <class Weight>
struct StoredWeight {
  Matrix matrix;

  auto operator()(int64_t output, int64_t channel) const {
    const int64_t place = output * matrix.row_stride + channel * matrix.column_stride;
    return to_sum(static_cast<const Weight*>(matrix.data)[place]);
  }
};

// Blocks of [outputs, inner] up to this many elements are made whole, from a copy of the bias; of
// larger ones, whose inner dimension is long, one row at a time.
constexpr int64_t kLargestBlock = 1 << 14;  // 64 KiB of float32: a first-level cache
// Of a site or of a code, for an output.
constexpr double kNanosecondsPerOutput = 0.25;

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
