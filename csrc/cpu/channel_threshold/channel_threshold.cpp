// Thresholds per channel: the elements above a bound that only rises, gathered in one pass.
#include <type_traits>

#include "cpu/common/buffer.h"
#include "cpu/common/channels.h"
#include "cpu/common/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/order/digits.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

constexpr double kNanosecondsPerElement = 0.2, kNanosecondsPerDouble = 8;
// So many wanted ones are selected by insertion, more of them by the histograms of their digits.
constexpr int64_t kFew = 32;
// Candidates beyond the wanted ones before they are reduced to those: few enough for the bound to
// rise early, many enough for a selection to pay, whose histograms take 24 KiB.
constexpr int64_t kSlackOfFew = 64, kLeastSlack = 512;
// A vector of a 64-byte line; patterns are read at any offset, so lines are all that aligns them.
constexpr int kLanes = kFloatLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The wanted-th largest of count >= wanted keys.
int32_t kth_largest(const int32_t* keys, int64_t count, int64_t wanted) {
  if (wanted > kFew) {
    return kth_by_digits<int32_t>([&](int64_t i) { return keys[i]; }, count, wanted).key;
  }
  int32_t largest[kFew];  // descending
  int64_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = keys[i];
    if (held == wanted && key <= largest[held - 1]) continue;
    int64_t place = held < wanted ? held++ : held - 1;
    for (; place > 0 && largest[place - 1] < key; --place) largest[place] = largest[place - 1];
    largest[place] = key;
  }
  return largest[wanted - 1];
}

// The keys of a channel's largest elements so far.
class Candidates {
 public:
  // Of `wanted` elements, among at most `most` of them.
  Candidates(int64_t wanted, int64_t most) : wanted_(wanted) {
    const int64_t many = wanted > kLeastSlack ? wanted : kLeastSlack;
    const int64_t slack = wanted > kFew ? many : kSlackOfFew;
    room_ = wanted + slack < most ? wanted + slack : most;
  }
  ~Candidates() { std::free(keys_); }
  Candidates(const Candidates&) = delete;
  Candidates& operator=(const Candidates&) = delete;

  int64_t count() const { return count_; }
  const int32_t* keys() const { return keys_; }

  // Takes x in. True when the bound has risen: elements <= bound() no longer matter.
  bool add(float x) {
    if (count_ == allocated_) grow();
    keys_[count_++] = key_of(x);
    if (count_ < room_ || count_ <= wanted_) return false;
    keep_wanted();
    return true;
  }

  float bound() const { return bound_; }

 private:
  void grow() {
    const int64_t doubled = allocated_ == 0 ? kFew + kSlackOfFew : 2 * allocated_;
    const int64_t more = doubled < room_ ? doubled : room_;
    void* moved = std::realloc(keys_, static_cast<size_t>(more) * sizeof(int32_t));
    if (moved == nullptr) throw std::bad_alloc();
    keys_ = static_cast<int32_t*>(moved);
    allocated_ = more;
  }

  void keep_wanted() {
    const int32_t last = kth_largest(keys_, count_, wanted_);
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int32_t key = keys_[i];
      keys_[kept] = key;
      kept += key > last;
    }
    while (kept < wanted_) keys_[kept++] = last;
    count_ = kept;
    // Above +inf there is only NaN, which exceeds every bound.
    bound_ = last > key_of(kInfinity) ? kInfinity : number_of(last);
  }

  int64_t wanted_, room_, count_ = 0, allocated_ = 0;
  int32_t* keys_ = nullptr;
  float bound_ = -kInfinity;
};

// Candidates of all channels, for each thread from its share of the elements.
class Gathered {
 public:
  Gathered(int team, int64_t channels, int64_t wanted, int64_t most)
      : channels_(channels), count_(team * channels), all_(count_) {
    for (int64_t i = 0; i < count_; ++i) new (all_.get() + i) Candidates(wanted, most);
  }
  ~Gathered() {
    for (int64_t i = 0; i < count_; ++i) all_.get()[i].~Candidates();
  }
  Gathered(const Gathered&) = delete;
  Gathered& operator=(const Gathered&) = delete;

  // Of a thread, by channel.
  Candidates* operator[](int member) const { return all_.get() + member * channels_; }

 private:
  int64_t channels_, count_;
  Buffer<Candidates> all_;
};

// Bound by memory: a load, a load from the caches and a comparison per vector; few elements pass.
template <class Stored>
void gather(const Stored* x, const ChannelPattern<kLanes>& pattern, const int32_t* channel_at,
            Share share, int64_t channels, Candidates* gathered) {
  const Buffer<float> bounds(pattern.size());
  for (int64_t c = 0; c < channels; ++c) pattern.set(bounds.get(), c, -kInfinity);
  pattern.walk(share.begin, share.end, [&](int64_t first, int count, int64_t place) {
    const FloatLanes vector = load_some(x + first, count);
    uint32_t passed = exceeding(vector, load(bounds.get() + place), count);
    for (; passed != 0; passed &= passed - 1) {
      const int lane = __builtin_ctz(passed);
      const int32_t channel = channel_at[place + lane];
      Candidates& candidates = gathered[channel];
      if (candidates.add(vector[lane])) pattern.set(bounds.get(), channel, candidates.bound());
    }
  });
}

// The wanted-th largest of a channel, from the candidates of all threads. What is missing in them
// is -inf: nothing else fails to exceed the first bound.
float wanted_of(const Gathered& gathered, int team, int64_t channel, int64_t wanted) {
  int64_t count = 0;
  for (int t = 0; t < team; ++t) count += gathered[t][channel].count();
  if (count < wanted) return -kInfinity;
  const Buffer<int32_t> keys(count);
  int64_t filled = 0;
  for (int t = 0; t < team; ++t) {
    const Candidates& part = gathered[t][channel];
    if (part.count() == 0) continue;
    std::memcpy(keys.get() + filled, part.keys(),
                static_cast<size_t>(part.count()) * sizeof(int32_t));
    filled += part.count();
  }
  const int32_t key = kth_largest(keys.get(), count, wanted);
  return key > key_of(kInfinity) ? std::numeric_limits<float>::quiet_NaN() : number_of(key);
}

template <class Stored>
void thresholds(const Stored* x, const ChannelShape& shape, int64_t rank, Stored* out,
                int threads) {
  const int64_t wanted = shape.per_channel() - rank + 1;
  const int team =
      useful_threads(threads, kNanosecondsPerElement * static_cast<double>(shape.total()));
  const ChannelPattern<kLanes> pattern(shape);
  const Buffer<int32_t> channel_at(pattern.size());
  for (int64_t c = 0; c < shape.channels; ++c) {
    pattern.set(channel_at.get(), c, static_cast<int32_t>(c));
  }
  const Gathered gathered(team, shape.channels, wanted, shape.per_channel());
  in_parallel(team, [&](int t) {
    gather(x, pattern, channel_at.get(), share_of(shape.total(), t, team), shape.channels,
           gathered[t]);
  });
  share_out(team, shape.channels,
            [&](int64_t c) { from_sum(wanted_of(gathered, team, c, wanted), out + c); });
}

// Doubles are for checking gradients: channel by channel, without vectors.
void thresholds(const double* x, const ChannelShape& shape, int64_t rank, double* out,
                int threads) {
  const int64_t n = shape.per_channel(), step = shape.channels * shape.inner;
  const int team =
      useful_threads(threads, kNanosecondsPerDouble * static_cast<double>(shape.total()));
  share_out(team, shape.channels, [&](int64_t c) {
    const double* first = x + c * shape.inner;
    const auto key_at = [&](int64_t i) {
      return key_of(first[i / shape.inner * step + i % shape.inner]);
    };
    const int64_t key = kth_by_digits<int64_t>(key_at, n, n - rank + 1).key;
    const bool number = key <= key_of(std::numeric_limits<double>::infinity());
    out[c] = number ? bit_cast<double>(key ^ ((key >> 63) & INT64_MAX))
                    : std::numeric_limits<double>::quiet_NaN();
  });
}

}  // namespace

void channel_threshold(const ChannelThresholdArguments& call, int threads) {
  const KeepDenormals mode;
  visit_dtype("channel_threshold", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    thresholds(static_cast<const Stored*>(call.x.data), shape_of(call.x), call.rank,
               static_cast<Stored*>(call.thresholds), threads);
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
