// The element of given rank in each channel: one block per channels alone, or several blocks that
// count for them and meet in memory after each digit.
#include "cuda/channel_threshold/digits.cuh"
#include "cuda/channel_threshold/plan.h"
#include "cuda/common/dtypes.cuh"

namespace sparsekern::cuda {

namespace {

// Elements from which on a part is worth a block: several times the counters it has to clear and to
// read again.
constexpr int64_t kLeastPart = 65536;
// No block counts more elements of one channel, so that a counter of 32 bits cannot overflow.
constexpr int64_t kMostPart = int64_t{1} << 30;
// Keys of a channel that a list has room for: twice the counters, and a small part of the least
// that several blocks share.
constexpr int64_t kListed = 4096;

// What blocks that share channels leave for each other.
struct Shared {
  unsigned long long* counts;  // [channels, digits]
  Found* found;                // [channels]
  Lists lists;
};

template <class Own>
__device__ int owned_channels(int64_t first, int64_t channels) {
  return static_cast<int>(channels - first < Own::kSlots ? channels - first : Own::kSlots);
}

// thresholds[c] = the number that is the wanted-th in order. A block owns its channels and reads
// them once per digit, three times in float32 and twice in 16 bits; bound by the first read, and by
// the later ones where the blocks in flight have more than the L2 cache holds.
template <class T, class Own>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_alone_kernel(Channels<T> t, int64_t wanted, T* thresholds) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, counts);
  __shared__ Found found[Own::kSlots];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Own::kSlots;
  const int count = owned_channels<Own>(first, t.channels);
  if (threadIdx.x < Own::kSlots) found[threadIdx.x] = {0, 0, wanted};
  for (int high = kKeyBits<T>; high > 0;) {
    const Digit digit = digit_below<Own>(high);
    DigitCounter<T, Own> counter{counts, found, digit, Source::data, Lists{}};
    count_digits(t, first, count, 0, 1, counter);
    extend<Own>(counts, digit, 0, found);
    high = digit.shift;
  }
  if (static_cast<int>(threadIdx.x) < count) {
    write_number(found[threadIdx.x].prefix, &thresholds[first + threadIdx.x]);
  }
}

// counts[c][digit] += elements of the channel with the prefix and that digit. A block counts a part
// of its channels in shared memory and adds what it found to the others'. Integers: the order of
// the additions does not show. Bound by reading the tensor once, in a pass over the lists by
// nothing.
template <class T, class Own>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_count_kernel(Channels<T> t, int64_t parts, Digit digit, Source source,
                           Shared shared) {
  SPARSEKERN_DYNAMIC_SHARED(unsigned, counts);
  const int64_t first = blockIdx.x / parts * Own::kSlots;
  const int count = owned_channels<Own>(first, t.channels);
  const Lists lists{shared.lists.keys + first * shared.lists.room, shared.lists.lengths + first,
                    shared.lists.room};
  DigitCounter<T, Own> counter{counts, shared.found + first, digit, source, lists};
  count_digits(t, first, count, blockIdx.x % parts, parts, counter);
  for (int i = threadIdx.x; i < kDigits<Own> * count; i += kChannelThreads) {
    const int slot = i % count;
    const unsigned long long here = counts[i / count * Own::kSlots + slot];
    if (here == 0) continue;
    atomicAdd(&shared.counts[(first + slot) * kDigits<Own> + i / count], here);
  }
}

// A block extends the prefix of one channel and clears its counters for the next digit; after the
// last digit the prefix is the key. Bound by latency.
template <class T, class Own>
__global__ void __launch_bounds__(kChannelThreads)
    threshold_extend_kernel(Digit digit, int64_t wanted, Shared shared, T* thresholds) {
  __shared__ Found found;
  const int64_t channel = blockIdx.x;
  unsigned long long* counts = shared.counts + channel * kDigits<Own>;
  if (threadIdx.x == 0) {
    found = shared.found[channel];
    if (digit.high == kKeyBits<T>) found.wanted = wanted;
  }
  __syncthreads();
  // What is listed stays listed.
  const int64_t room = digit.high == kKeyBits<T> ? shared.lists.room : 0;
  const unsigned listed = found.listed;
  extend<Owned<Own::kDigitBits, 1>>(counts, digit, room, &found);
  for (int d = threadIdx.x; d < kDigits<Own>; d += kChannelThreads) counts[d] = 0;
  if (threadIdx.x != 0) return;
  if (listed != 0) found.listed = listed;
  shared.found[channel] = found;
  if (digit.shift == 0) write_number(found.prefix, &thresholds[channel]);
}

// Where the parts of the workspace begin, in bytes: counters, prefixes and lengths, which start as
// zeros, then the lists.
struct Places {
  int64_t found, lengths, keys, end;
};

template <class Own>
Places place_shared(int64_t channels, int64_t room) {
  Places places;
  places.found = channels * kDigits<Own> * static_cast<int64_t>(sizeof(unsigned long long));
  places.lengths = places.found + channels * static_cast<int64_t>(sizeof(Found));
  places.keys = places.lengths + channels * static_cast<int64_t>(sizeof(unsigned));
  places.end = places.keys + channels * room * static_cast<int64_t>(sizeof(unsigned));
  return places;
}

template <class T, class Own>
void find_thresholds(const ThresholdCall& call, const ThresholdPlan& plan) {
  const Channels<T> t = make_channels<T>(call.x);
  T* thresholds = static_cast<T*>(call.thresholds);
  // Keys start with the largest element.
  const int64_t wanted = call.x.outer * call.x.inner - call.rank + 1;
  const int64_t owners = divide_up(t.channels, Own::kSlots);
  if (plan.parts == 1) {
    launch(threshold_alone_kernel<T, Own>, grid_of(owners), kChannelThreads, kCounterBytes<Own>,
           call.stream, t, wanted, thresholds);
    return;
  }
  const Places places = place_shared<Own>(t.channels, plan.listed);
  char* bytes = static_cast<char*>(call.workspace);
  const Shared shared{reinterpret_cast<unsigned long long*>(bytes),
                      reinterpret_cast<Found*>(bytes + places.found),
                      {reinterpret_cast<unsigned*>(bytes + places.keys),
                       reinterpret_cast<unsigned*>(bytes + places.lengths), plan.listed}};
  check(cudaMemsetAsync(bytes, 0, static_cast<size_t>(places.keys), call.stream),
        "channel_threshold: cudaMemsetAsync");
  for (int high = kKeyBits<T>; high > 0;) {
    const Digit digit = digit_below<Own>(high);
    Source source = Source::data;
    if (plan.listed > 0 && high < kKeyBits<T>) {
      source = digit.shift > 0 ? Source::data_to_list : Source::list;
    }
    launch(threshold_count_kernel<T, Own>, grid_of(owners * plan.parts), kChannelThreads,
           kCounterBytes<Own>, call.stream, t, plan.parts, digit, source, shared);
    launch(threshold_extend_kernel<T, Own>, grid_of(t.channels), kChannelThreads, 0, call.stream,
           digit, wanted, shared, thresholds);
    high = digit.shift;
  }
}

// Calls visit(T(), Own()) with the types behind the dtype and the plan.
template <class Visit>
void visit_plan(Dtype dtype, const ThresholdPlan& plan, Visit&& visit) {
  visit_dtype("channel_threshold", dtype, [&](auto value) {
    using T = decltype(value);
    if (plan.runs) {
      visit(value, OneChannel());
    } else {
      visit(value, SeveralChannels<T>());
    }
  });
}

}  // namespace

ThresholdPlan plan_threshold(const ChannelTensor& x) {
  const int64_t elements = x.outer * x.inner;
  ThresholdPlan plan{x.channels == 1 || x.inner >= kLongRun, 1, 0};
  visit_plan(x.dtype, plan, [&](auto value, auto owned) {
    const int64_t most_slots = decltype(owned)::kSlots;
    const int64_t slots = most_slots < x.channels ? most_slots : x.channels;
    const int64_t most = elements * slots / kLeastPart;
    const int64_t shared = kFillBlocks / divide_up(x.channels, slots);
    plan.parts = shared < most ? shared : most;
    if (plan.parts < divide_up(elements, kMostPart)) plan.parts = divide_up(elements, kMostPart);
    const bool three = kDigitPasses<decltype(value)> == 3;
    plan.listed = three && plan.parts > 1 ? kListed : 0;
  });
  return plan;
}

int64_t planned_workspace(const ThresholdPlan& plan, const ChannelTensor& x) {
  if (plan.parts == 1) return 0;
  int64_t bytes = 0;
  visit_plan(x.dtype, plan, [&](auto, auto owned) {
    bytes = place_shared<decltype(owned)>(x.channels, plan.listed).end;
  });
  return bytes;
}

void channel_threshold(const ThresholdCall& call, const ThresholdPlan& plan) {
  if (call.x.channels == 0) return;
  visit_plan(call.x.dtype, plan, [&](auto value, auto owned) {
    find_thresholds<decltype(value), decltype(owned)>(call, plan);
  });
}

int64_t channel_threshold_workspace(const ChannelThresholdArguments& call) {
  if (call.x.channels == 0) return 0;
  return planned_workspace(plan_threshold(call.x), call.x);
}

void channel_threshold(const ChannelThresholdArguments& call, void* workspace,
                       cudaStream_t stream) {
  if (call.x.channels == 0) return;
  channel_threshold({call, workspace, stream}, plan_threshold(call.x));
}

}  // namespace sparsekern::cuda
