// How blocks walk over the channels of a tensor [outer, channels, inner].
//
// A channel consists of `outer` runs of `inner` neighbours. Long runs: a block owns one channel,
// and its warps take the runs. Short runs: a block owns neighbouring channels, whose runs lie side
// by side, and each of its threads keeps to one column of these rows. Several blocks may share what
// one owns; each then takes every (parts)-th piece.
#pragma once

#include <cstdint>

#include "cuda/common/packs.cuh"
#include "cuda/common/warp.cuh"
#include "interface/operands.h"

namespace sparsekern::cuda {

constexpr int kChannelThreads = 256;
constexpr int kChannelWarps = kChannelThreads / kWarp;
// Runs from here on keep the lanes of a warp busy.
constexpr int64_t kLongRun = 32;
// Runs are cut into pieces of so many elements, so that one long run occupies many warps.
constexpr int64_t kPiece = 4096;
// What a thread has under way: loads of 16 bytes, or of so many single elements.
constexpr int kPacksAtOnce = 4;
template <class T>
constexpr int kRowsAtOnce = 32 / static_cast<int>(sizeof(T));
// Blocks that share the work: four for each SM of the largest GPUs.
constexpr int64_t kFillBlocks = 528;

template <class T>
struct Channels {
  const T* x;  // [outer, channels, inner]
  int64_t outer, channels, inner;
};

// A single channel is one run, however it is cut.
template <class T>
Channels<T> make_channels(const void* x, int64_t outer, int64_t channels, int64_t inner) {
  if (channels == 1) return {static_cast<const T*>(x), 1, 1, outer * inner};
  return {static_cast<const T*>(x), outer, channels, inner};
}
template <class T>
Channels<T> make_channels(const ChannelTensor& x) {
  return make_channels<T>(x.data, x.outer, x.channels, x.inner);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b for numbers that are not negative: a division of 64 bits takes several times as long.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// a / b for an a below b + kMostLocal: the place of an element, counted from the start of its tile.
constexpr int64_t kMostLocal = 8192;
__device__ inline int64_t local_quotient(int64_t a, int64_t b) {
  if (b > kMostLocal) return a >= b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// ---- long runs ----

// Where the packs of a run begin and end: the elements before `head` and from `tail` on are read
// one by one.
struct Span {
  int head, packs, tail, length;
};

template <class T>
__device__ Span span_of(const T* run, int length, bool packed) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  if (!packed) return {length, 0, length, length};
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(run) % kVectorBytes / sizeof(T));
  const int before = past == 0 ? 0 : kCount - past;
  const int head = before < length ? before : length;
  const int packs = (length - head) / kCount;
  return {head, packs, head + packs * kCount, length};
}

// visitor.add(x) for the elements of a run, by the lanes of a warp.
template <class T, class Visitor>
__device__ void walk_run(const T* run, int length, Visitor& visitor) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % kWarp;
  const Span span = span_of(run, length, true);
  if (lane < span.head) visitor.add(run[lane]);
  for (int first = lane; first < span.packs; first += kWarp * kPacksAtOnce) {
    Pack<T, kCount> x[kPacksAtOnce];
#pragma unroll
    for (int u = 0; u < kPacksAtOnce; ++u) {
      const int pack = first + u * kWarp;
      if (pack < span.packs) x[u].load(run + span.head + pack * kCount);
    }
#pragma unroll
    for (int u = 0; u < kPacksAtOnce; ++u) {
      if (first + u * kWarp >= span.packs) break;
#pragma unroll
      for (int c = 0; c < kCount; ++c) visitor.add(x[u].item[c]);
    }
  }
  if (span.tail + lane < length) visitor.add(run[span.tail + lane]);
}

// A part of the pieces of one channel: visitor.start(0), which says whether to go on,
// visitor.add(x) for each element and visitor.stop(), in every thread.
template <class T, class Visitor>
__device__ void walk_runs(const Channels<T>& t, int64_t channel, int64_t part, int64_t parts,
                          Visitor& visitor) {
  if (!visitor.start(0)) return;
  const int64_t pieces = (t.inner + kPiece - 1) / kPiece;
  for (int64_t i = part * kChannelWarps + threadIdx.x / kWarp; i < t.outer * pieces;
       i += parts * kChannelWarps) {
    const int64_t o = pieces == 1 ? i : i / pieces;
    const int64_t s = (i - o * pieces) * kPiece;
    const int64_t left = t.inner - s;
    walk_run(t.x + (o * t.channels + channel) * t.inner + s,
             static_cast<int>(left < kPiece ? left : kPiece), visitor);
  }
  visitor.stop();
}

// ---- short runs ----

// The same for `count` neighbouring channels: visitor.start(slot) with the channel's number among
// them. Threads beyond a whole number of rows do nothing.
template <class T, class Visitor>
__device__ void walk_rows(const Channels<T>& t, int64_t first_channel, int count, int64_t part,
                          int64_t parts, Visitor& visitor) {
  const int inner = static_cast<int>(t.inner);
  const int columns = count * inner;
  const int sweeps = (columns + kChannelThreads - 1) / kChannelThreads;
  const int width = (columns + sweeps - 1) / sweeps;
  const int rows = kChannelThreads / width;
  const int own = static_cast<int>(threadIdx.x) / width;
  if (own >= rows) return;
  const int64_t stride = t.channels * t.inner;
  const int64_t step = parts * rows;
  constexpr int kAtOnce = kRowsAtOnce<T>;
  for (int column = threadIdx.x % width; column < columns; column += width) {
    if (!visitor.start(column / inner)) continue;
    const T* x = t.x + first_channel * t.inner + column;
    for (int64_t row = part * rows + own; row < t.outer; row += step * kAtOnce) {
      T item[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (row + u * step < t.outer) item[u] = __ldg(x + (row + u * step) * stride);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (row + u * step < t.outer) visitor.add(item[u]);
      }
    }
    visitor.stop();
  }
}

}  // namespace sparsekern::cuda
