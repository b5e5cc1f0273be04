// Finding an element of given rank in each of a block's channels by counting digits of the keys,
// the most significant first. Keys are those of keys.cuh: the largest element comes first.
#pragma once

#include "cuda/common/channels.cuh"
#include "cuda/common/keys.cuh"

namespace sparsekern::cuda {

template <class T>
constexpr int kKeyBits = 32 - key_shift<T>;
constexpr int kMostDigitBits = 11;
// Passes over the data: three over float32, two over the others.
template <class T>
constexpr int kDigitPasses = (kKeyBits<T> + kMostDigitBits - 1) / kMostDigitBits;

// How many bits a digit has, and how many channels a block owns.
template <int kBits, int kChannels>
struct Owned {
  static constexpr int kDigitBits = kBits;
  static constexpr int kSlots = kChannels;
};

// One channel: 2048 digits (8 KiB). More digits mean fewer threads of a warp that want the same
// counter.
using OneChannel = Owned<kMostDigitBits, 1>;

// Neighbouring channels, 16384 counters for all (64 KiB), so that rows of at least 32 bytes fit: 8
// channels of float32, 16 of float16, 64 of bfloat16. Neighbouring lanes have neighbouring
// channels, whose counters lie in different banks.
template <class T>
constexpr int kFewestBits = (kKeyBits<T> + kDigitPasses<T> - 1) / kDigitPasses<T>;
template <class T>
using SeveralChannels = Owned<kFewestBits<T>, 1 << (14 - kFewestBits<T>)>;

template <class Own>
constexpr int kDigits = 1 << Own::kDigitBits;
template <class Own>
constexpr size_t kCounterBytes = sizeof(unsigned) * kDigits<Own> * Own::kSlots;

// What the digits so far have decided about a channel.
struct Found {
  unsigned prefix;  // the upper bits of the key
  unsigned listed;  // how many keys share them, where these are listed; else 0
  int64_t wanted;   // which of these it is, in order, from 1
};

// Which bits a pass looks at: keys that agree with the prefix from bit `high` on, and of those the
// digit from bit `shift` on.
struct Digit {
  int high, shift;

  __device__ bool applies(unsigned key, unsigned prefix) const {
    // A shift by all 32 bits is not defined, hence in two steps.
    return (key ^ prefix) >> (high - 1) >> 1 == 0;
  }
  __device__ unsigned of(unsigned key) const {
    return (key >> shift) & ((1u << (high - shift)) - 1);
  }
};

template <class Own>
__host__ __device__ Digit digit_below(int high) {
  return {high, high > Own::kDigitBits ? high - Own::kDigitBits : 0};
}

// The keys of each channel that the next pass need not look for in the data.
struct Lists {
  unsigned* keys;     // [channels, room], or null
  unsigned* lengths;  // [channels]
  int64_t room;
};

enum class Source { data, data_to_list, list };

// counts[digit, slot] += elements of the slot's channel with that digit. A thread counts equal
// digits that follow each other before it adds them, so ties and zeros do not make it wait for
// others at their counter.
template <class T, class Own>
struct DigitCounter {
  unsigned* counts;
  const Found* found;  // of the block's first channel
  Digit digit;
  Source source;
  Lists lists;  // of the block's first channel
  int slot = 0;
  unsigned prefix = 0, last = 0, repeats = 0;
  bool listing = false;

  // False where the list has it all.
  __device__ bool start(int own_slot) {
    begin(own_slot);
    listing = source == Source::data_to_list && found[slot].listed != 0;
    return source != Source::list || found[slot].listed == 0;
  }
  __device__ void begin(int own_slot) {
    slot = own_slot;
    prefix = found[slot].prefix;
    last = repeats = 0;
    listing = false;
  }
  __device__ void add(T x) { add_key(key_of(x, kSigned)); }
  __device__ void add_key(unsigned key) {
    if (!digit.applies(key, prefix)) return;
    const unsigned here = digit.of(key);
    if (here != last) {
      stop();
      last = here;
      repeats = 0;
    }
    ++repeats;
    if (listing) lists.keys[slot * lists.room + atomicAdd(&lists.lengths[slot], 1u)] = key;
  }
  __device__ void stop() {
    if (repeats != 0) atomicAdd(&counts[last * Own::kSlots + slot], repeats);
  }
};

// Counts a part of what the block owns: `count` channels from the first one on.
template <class T, class Own>
__device__ void count_digits(const Channels<T>& t, int64_t first, int count, int64_t part,
                             int64_t parts, DigitCounter<T, Own>& counter) {
  for (int i = threadIdx.x; i < kDigits<Own> * Own::kSlots; i += kChannelThreads) {
    counter.counts[i] = 0;
  }
  __syncthreads();
  if (Own::kSlots == 1) {
    walk_runs(t, first, part, parts, counter);
  } else {
    walk_rows(t, first, count, part, parts, counter);
  }
  for (int slot = 0; slot < count && counter.source == Source::list && part == 0; ++slot) {
    counter.begin(slot);
    const unsigned* keys = counter.lists.keys + slot * counter.lists.room;
    for (unsigned i = threadIdx.x; i < counter.found[slot].listed; i += kChannelThreads) {
      counter.add_key(keys[i]);
    }
    counter.stop();
  }
  __syncthreads();
}

// Extends each slot's prefix by the digit in which the wanted key lies; found is in shared memory.
// Lists may hold what shares the new prefix if that is at most `room`. The threads of a slot share
// its digits.
template <class Own, class Count>
__device__ void extend(const Count* counts, Digit digit, int64_t room, Found* found) {
  constexpr int kSlots = Own::kSlots;
  constexpr int kOwn = kDigits<Own> * kSlots / kChannelThreads;
  static_assert(kOwn * kChannelThreads == kDigits<Own> * kSlots && kSlots <= kChannelThreads,
                "each thread has as many digits of one slot");
  __shared__ int64_t sums[kChannelThreads];
  const int slot = threadIdx.x % kSlots;
  const int first = static_cast<int>(threadIdx.x) / kSlots * kOwn;
  int64_t own = 0;
  for (int d = 0; d < kOwn; ++d) own += counts[(first + d) * kSlots + slot];
  sums[threadIdx.x] = own;
  const Found old = found[slot];
  __syncthreads();
  for (int step = kSlots; step < kChannelThreads; step *= 2) {
    const int other = static_cast<int>(threadIdx.x) - step;
    const int64_t before = other >= 0 ? sums[other] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  int64_t before = sums[threadIdx.x] - own;
  if (before < old.wanted && old.wanted <= before + own) {
    int place = first;
    int64_t here = counts[place * kSlots + slot];
    while (before + here < old.wanted) {
      before += here;
      ++place;
      here = counts[place * kSlots + slot];
    }
    found[slot] = {old.prefix | static_cast<unsigned>(place) << digit.shift,
                   here <= room ? static_cast<unsigned>(here) : 0u, old.wanted - before};
  }
  __syncthreads();
}

// The number of a key; keys do not tell -0 from +0, and NaNs from each other.
template <class T>
__device__ void write_number(unsigned key, T* out) {
  from_float(key == 0 ? __int_as_float(0x7fffffff) : float_of<T>(key), out);
}

}  // namespace sparsekern::cuda
