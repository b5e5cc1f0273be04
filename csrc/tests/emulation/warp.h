// Shuffles, votes and reductions of a warp. The full mask only; lanes that have returned from the
// kernel are left out, as on the hardware.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "tests/emulation/block.h"

namespace sparsekern::emulation {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// What a shuffle out of a lane that has returned gives: anything; here always the same.
constexpr uint64_t nobodys_value = 0xCDCDCDCDCDCDCDCD;

// The value of lane source(own lane), or the caller's own where that is outside 0..31.
template <class T, class Source>
T shuffle(unsigned mask, T value, Where where, Source source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  require_full_mask(mask, where);
  const Operands all = exchange(Together::shuffle, std::bit_cast<Bits<T>>(value), where);
  const int lane = source(static_cast<int>(all.self));
  const bool present = (all.present >> lane & 1u) != 0;
  return std::bit_cast<T>(static_cast<Bits<T>>(present ? all.lane[lane] : nobodys_value));
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Where where, Combine combine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  require_full_mask(mask, where);
  const Operands all = exchange(Together::reduce, std::bit_cast<uint32_t>(value), where);
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (lane == all.self || (all.present >> lane & 1u) == 0) continue;
    value = combine(value, std::bit_cast<T>(static_cast<uint32_t>(all.lane[lane])));
  }
  return value;
}

inline unsigned votes(unsigned mask, bool predicate, Where where) {
  require_full_mask(mask, where);
  const Operands all = exchange(Together::vote, predicate ? 1 : 0, where);
  unsigned holds = 0;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    holds |= static_cast<unsigned>(all.lane[lane]) << lane;
  }
  return holds & all.present;
}

}  // namespace sparsekern::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu, sparsekern::emulation::Where where =
                                                        sparsekern::emulation::Where::current()) {
  sparsekern::emulation::require_full_mask(mask, where);
  sparsekern::emulation::sync_warp(where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::shuffle(
      mask, value, where, [=](int lane) { return (lane & -width) | (source & (width - 1)); });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::shuffle(mask, value, where, [=](int lane) {
    const int from = (lane & (width - 1)) - static_cast<int>(delta);
    return from >= 0 ? lane - static_cast<int>(delta) : lane;
  });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::shuffle(mask, value, where, [=](int lane) {
    const int from = (lane & (width - 1)) + static_cast<int>(delta);
    return from < width ? lane + static_cast<int>(delta) : lane;
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::shuffle(mask, value, where, [=](int lane) {
    const int from = lane ^ lane_mask;  // may lie in an earlier segment, but in no later one
    return from < (lane & -width) + width ? from : lane;
  });
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::votes(mask, predicate != 0, where);
}

inline int __any_sync(
    unsigned mask, int predicate,
    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::votes(mask, predicate != 0, where) != 0;
}

inline int __all_sync(
    unsigned mask, int predicate,
    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::votes(mask, predicate == 0, where) == 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value,
                    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::reduce(mask, value, where, [](T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}

template <class T>
T __reduce_max_sync(unsigned mask, T value,
                    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::reduce(mask, value, where, [](T a, T b) { return a < b ? b : a; });
}

template <class T>
T __reduce_min_sync(unsigned mask, T value,
                    sparsekern::emulation::Where where = sparsekern::emulation::Where::current()) {
  return sparsekern::emulation::reduce(mask, value, where, [](T a, T b) { return b < a ? b : a; });
}
