// What exceeds the threshold of its channel: with the zeros around it, or without them.
#include <memory>

#include "cpu/common/buffer.h"
#include "cpu/common/channels.h"
#include "cpu/common/dtypes.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

constexpr double kNanosecondsPerElement = 0.25;

int useful_threads_of(int threads, const ChannelShape& shape) {
  return useful_threads(threads, kNanosecondsPerElement * static_cast<double>(shape.total()));
}

// Numbers per channel, spread out for vectors, and what they make of an element.
template <class Stored>
class Excess {
 public:
  using Scalar = typename Sum<Stored>::Scalar;
  using Lanes = typename Sum<Stored>::Lanes;
  static constexpr int kLanes = Sum<Stored>::kLanes;

  Excess(const ChannelShape& shape, const void* threshold, const void* scale, const void* shift)
      : pattern(shape),
        normalised_(scale != nullptr),
        threshold_(pattern.size()),
        scale_(normalised_ ? pattern.size() : 0),
        shift_(normalised_ ? pattern.size() : 0),
        channel_at_(pattern.size()) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      pattern.set(threshold_.get(), c, static_cast<const Scalar*>(threshold)[c]);
      pattern.set(channel_at_.get(), c, static_cast<int32_t>(c));
      if (!normalised_) continue;
      pattern.set(scale_.get(), c, static_cast<const Scalar*>(scale)[c]);
      pattern.set(shift_.get(), c, static_cast<const Scalar*>(shift)[c]);
    }
  }

  // z - t of a vector whose numbers start at `place`, and a bit for each of its `count` lanes
  // where not z <= t.
  Lanes operator()(Lanes x, int count, int64_t place, uint32_t* active) const {
    const Lanes t = load(threshold_.get() + place);
    const Lanes z =
        normalised_ ? multiply_add(x, load(scale_.get() + place), load(shift_.get() + place)) : x;
    *active = exceeding(z, t, count);
    return z - t;
  }

  int32_t channel_at(int64_t place) const { return channel_at_.get()[place]; }

  const ChannelPattern<kLanes> pattern;

 private:
  bool normalised_;
  Buffer<Scalar> threshold_, scale_, shift_;
  Buffer<int32_t> channel_at_;
};

// The lanes whose bit is set; the others are zero.
inline FloatLanes only(FloatLanes x, uint32_t bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
#else
  IntLanes lane_bit;
  for (int lane = 0; lane < kFloatLanes; ++lane) lane_bit[lane] = 1 << lane;
  const IntLanes set = (broadcast(static_cast<int32_t>(bits)) & lane_bit) == lane_bit;
  return (FloatLanes)(set & (IntLanes)x);
#endif
}
inline DoubleLanes only(DoubleLanes x, uint32_t bits) {
  for (int lane = 0; lane < kDoubleLanes; ++lane) {
    if ((bits >> lane & 1) == 0) x[lane] = 0;
  }
  return x;
}

// Bound by memory: one read and one write.
template <class Stored>
void relu(const Stored* x, const ChannelShape& shape, const Excess<Stored>& excess, Stored* y,
          int64_t* counts, int threads) {
  const int team = useful_threads_of(threads, shape);
  const Buffer<int64_t> own(shape.channels * team);
  std::memset(own.get(), 0, static_cast<size_t>(shape.channels * team) * sizeof(int64_t));
  in_parallel(team, [&](int t) {
    int64_t* mine = own.get() + shape.channels * t;
    const Share share = share_of(shape.total(), t, team);
    excess.pattern.walk(share.begin, share.end, [&](int64_t first, int count, int64_t place) {
      uint32_t active;
      const auto above = excess(load_some(x + first, count), count, place, &active);
      store_some(y + first, only(above, active), count);
      for (; active != 0; active &= active - 1) {
        ++mine[excess.channel_at(place + __builtin_ctz(active))];
      }
    });
  });
  for (int t = 0; t < team; ++t) {
    for (int64_t c = 0; c < shape.channels; ++c) counts[c] += own.get()[shape.channels * t + c];
  }
}

// A list that grows; a thread's own.
template <class T>
class List {
 public:
  ~List() { std::free(data_); }
  List() = default;
  List(const List&) = delete;
  List& operator=(const List&) = delete;

  void add(T x) {
    if (count_ == room_) {
      const int64_t more = room_ == 0 ? 1024 : 2 * room_;
      void* moved = std::realloc(data_, static_cast<size_t>(more) * sizeof(T));
      if (moved == nullptr) throw std::bad_alloc();
      data_ = static_cast<T*>(moved);
      room_ = more;
    }
    data_[count_++] = x;
  }
  int64_t count() const { return count_; }
  void copy_to(T* out) const {
    if (count_ > 0) std::memcpy(out, data_, static_cast<size_t>(count_) * sizeof(T));
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0, room_ = 0;
};

template <class Stored>
struct Found {
  List<int64_t> indices;
  List<Stored> values;
};

// Bound by reading x.
template <class Stored>
void find(const Stored* x, const Excess<Stored>& excess, Share share, Found<Stored>* found,
          int64_t* counts) {
  excess.pattern.walk(share.begin, share.end, [&](int64_t first, int count, int64_t place) {
    uint32_t active;
    const auto above = excess(load_some(x + first, count), count, place, &active);
    for (; active != 0; active &= active - 1) {
      const int lane = __builtin_ctz(active);
      Stored value;
      from_sum(above[lane], &value);
      found->indices.add(first + lane);
      found->values.add(value);
      ++counts[excess.channel_at(place + lane)];
    }
  });
}

template <class Stored>
void codes(const Stored* x, const ChannelShape& shape, const Excess<Stored>& excess,
           int64_t capacity, Stored* values, int64_t* indices, int64_t* counts, int threads) {
  const int team = useful_threads_of(threads, shape);
  const Buffer<int64_t> own(shape.channels * team);
  std::memset(own.get(), 0, static_cast<size_t>(shape.channels * team) * sizeof(int64_t));
  const std::unique_ptr<Found<Stored>[]> found(new Found<Stored>[static_cast<size_t>(team)]);
  in_parallel(team, [&](int t) {
    find(x, excess, share_of(shape.total(), t, team), &found[t], own.get() + shape.channels * t);
  });
  int64_t total = 0;
  for (int t = 0; t < team; ++t) {
    total += found[t].indices.count();
    for (int64_t c = 0; c < shape.channels; ++c) counts[c] += own.get()[shape.channels * t + c];
  }
  int64_t place = 0;
  for (int t = 0; t < team && total <= capacity; ++t) {
    found[t].indices.copy_to(indices + place);
    found[t].values.copy_to(values + place);
    place += found[t].indices.count();
  }
}

}  // namespace

void threshold_relu(const ThresholdReluArguments& call, int threads) {
  const KeepDenormals mode;
  const ChannelShape shape = shape_of(call.x);
  visit_dtype("threshold_relu", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const Excess<Stored> excess(shape, call.threshold, call.scale, call.shift);
    relu(static_cast<const Stored*>(call.x.data), shape, excess, static_cast<Stored*>(call.y),
         call.counts, threads);
  });
}

void threshold_codes(const ThresholdCodesArguments& call, int threads) {
  const KeepDenormals mode;
  const ChannelShape shape = shape_of(call.x);
  visit_dtype("threshold_codes", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const Excess<Stored> excess(shape, call.threshold, call.scale, call.shift);
    codes(static_cast<const Stored*>(call.x.data), shape, excess, call.capacity,
          static_cast<Stored*>(call.values), call.indices, call.counts, threads);
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
