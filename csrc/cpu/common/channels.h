// Tensors [outer, channels, inner] read once, front to back, with numbers per channel beside them.
//
// Numbers per channel are spread out so that a vector of them can be loaded for any vector of
// elements. With a long inner dimension a run of elements has one channel: a vector of copies for
// each channel. Otherwise channels alternate with a period of channels * inner elements: one period
// and the beginning of the next, from which a vector is loaded at the place in the period.
#pragma once

#include <cstdint>

#include "cpu/common/buffer.h"
#include "cpu/common/parallel.h"
#include "cpu/simd/comparisons.h"
#include "interface/operands.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

struct ChannelShape {
  int64_t outer, channels, inner;

  int64_t total() const { return outer * channels * inner; }
  int64_t per_channel() const { return outer * inner; }
};

inline ChannelShape shape_of(const ChannelTensor& x) { return {x.outer, x.channels, x.inner}; }

// How the numbers are spread for vectors of kLanes elements.
template <int kLanes>
class ChannelPattern {
 public:
  explicit ChannelPattern(const ChannelShape& shape)
      : shape_(shape), runs_(shape.inner >= kShortestRun) {}

  bool runs() const { return runs_; }
  int64_t period() const { return shape_.channels * shape_.inner; }
  int64_t size() const { return runs_ ? shape_.channels * kLanes : period() + kLanes; }

  // Writes a channel's number to all of its places in `spread`.
  template <class T>
  void set(T* spread, int64_t channel, T value) const {
    if (runs_) {
      for (int lane = 0; lane < kLanes; ++lane) spread[channel * kLanes + lane] = value;
      return;
    }
    for (int64_t i = channel * shape_.inner; i < (channel + 1) * shape_.inner; ++i) {
      for (int64_t place = i; place < size(); place += period()) spread[place] = value;
    }
  }

  // Calls visit(first, count, place) for elements [begin, end) in vectors: `count` elements from
  // `first` on, all kLanes but at the end of a run, whose numbers start at `place`.
  template <class Visit>
  void walk(int64_t begin, int64_t end, Visit&& visit) const {
    if (!runs_) {
      int64_t place = begin % period();
      const int64_t step = kLanes % period();
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        visit(i, kLanes, place);
        place += step;
        place -= place >= period() ? period() : 0;
      }
      if (i < end) visit(i, static_cast<int>(end - i), place);
      return;
    }
    while (begin < end) {
      const int64_t run = begin / shape_.inner;
      const int64_t stop = (run + 1) * shape_.inner < end ? (run + 1) * shape_.inner : end;
      const int64_t place = run % shape_.channels * kLanes;
      int64_t i = begin;
      for (; i + kLanes <= stop; i += kLanes) visit(i, kLanes, place);
      if (i < stop) visit(i, static_cast<int>(stop - i), place);
      begin = stop;
    }
  }

 private:
  static constexpr int64_t kShortestRun = 4 * kLanes;

  ChannelShape shape_;
  bool runs_;
};

template <class Stored>
inline typename Sum<Stored>::Lanes load_some(const Stored* p, int count) {
  return count == Sum<Stored>::kLanes ? load(p) : load_partial(p, count);
}
template <class Stored>
inline void store_some(Stored* p, typename Sum<Stored>::Lanes x, int count) {
  if (count == Sum<Stored>::kLanes) return store(p, x);
  store_partial(p, x, count);
}

// One bit for each of the first `count` lanes where not a <= b: a > b, or one of them is NaN.
inline uint32_t exceeding(FloatLanes a, FloatLanes b, int count) {
#if defined(__AVX512F__)
  const uint32_t bits = _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
#else
  const uint32_t bits = bits_of(~(IntLanes)(a <= b));
#endif
  return bits & ((1u << count) - 1);
}
inline uint32_t exceeding(DoubleLanes a, DoubleLanes b, int count) {
  uint32_t bits = 0;
  for (int lane = 0; lane < count; ++lane)
    bits |= static_cast<uint32_t>(!(a[lane] <= b[lane])) << lane;
  return bits;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
