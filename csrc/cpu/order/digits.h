// The exact k-th key of any row by counting digits, then one pass in index order.
//
// Most significant digit first, 11 bits a pass: 3 passes over 32-bit keys, 6 over 64-bit keys.
#pragma once

#include <type_traits>

#include "cpu/order/keys.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

template <class Key>
struct ExactBound {
  Key key;       // the k-th largest key
  int64_t ties;  // how many equal to it are selected
};

// key_at(i) is the signed key of element i; n of them.
template <class Key, class KeyAt>
inline ExactBound<Key> kth_by_digits(const KeyAt& key_at, int64_t n, int64_t k) {
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr int kBits = sizeof(Key) * 8;
  constexpr Unsigned kSign = Unsigned{1} << (kBits - 1);  // signed order to unsigned order
  Unsigned prefix = 0;
  int64_t wanted = k;
  for (int high = kBits; high > 0; high -= kDigitBits) {
    const int shift = high > kDigitBits ? high - kDigitBits : 0;
    uint32_t histogram[kDigits] = {};
    for (int64_t i = 0; i < n; ++i) {
      const Unsigned key = static_cast<Unsigned>(key_at(i)) ^ kSign;
      // a shift by all bits would be undefined, hence the first pass takes everything
      if (high < kBits && (key >> high) != (prefix >> high)) continue;
      ++histogram[(key >> shift) & (kDigits - 1) & ((Unsigned{1} << (high - shift)) - 1)];
    }
    int digit = kDigits - 1;
    for (; histogram[digit] < wanted; --digit) wanted -= histogram[digit];
    prefix |= static_cast<Unsigned>(digit) << shift;
  }
  return {static_cast<Key>(prefix ^ kSign), wanted};
}

// Writes the indices of the first k elements of the total order, ascending.
template <class Key, class KeyAt>
inline void take_by_digits(const KeyAt& key_at, int64_t n, int64_t k, int64_t* indices) {
  ExactBound<Key> bound = kth_by_digits<Key>(key_at, n, k);
  int64_t count = 0;
  for (int64_t i = 0; i < n && count < k; ++i) {
    const Key key = key_at(i);
    if (key < bound.key || (key == bound.key && bound.ties-- <= 0)) continue;
    indices[count++] = i;
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
