// Candidates of the k largest, by ascending index, of which too many are dropped.
#pragma once

#include "cpu/topk/ranking.h"
#include "cpu/topk/regimes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

constexpr int64_t kRarelyTightened = 64;  // a few candidates more cost less than a bisection

// `Stored` is float or double.
template <class Stored>
class CandidateList {
 public:
  using Key = typename Sum<Stored>::Integer;

  explicit CandidateList(int64_t k) : k_(k) {}

  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  uint32_t index(int64_t i) const { return indices_[i]; }
  Key key(int64_t i) const { return keys_[i]; }

  bool is_long() const { return count_ > 2 * k_ + kRarelyTightened; }
  bool has_room_for(int64_t count) const { return count_ + count <= kCapacity; }

  // By ascending index, and only where there is room.
  void append(Key key, int64_t index) {
    keys_[count_] = key;
    indices_[count_++] = static_cast<uint32_t>(index);
  }

  // The same for those of 64 elements whose bit is set, without their keys; one bit is set.
  void append_word(uint64_t bits, int64_t first) {
    uint32_t* next = indices_ + count_;
    count_ += __builtin_popcountll(bits);
    // Most words have one bit or two, and no branch predictor could guess which. What is written
    // for a bit that is not there is overwritten by the next word.
    *next++ = static_cast<uint32_t>(first + __builtin_ctzll(bits));
    bits &= bits - 1;
    *next++ = static_cast<uint32_t>(first + (bits != 0 ? __builtin_ctzll(bits) : 0));
    for (bits &= bits - 1; bits != 0; bits &= bits - 1) {
      *next++ = static_cast<uint32_t>(first + __builtin_ctzll(bits));
    }
  }

  // The keys of those that were appended without, from `begin` on: number_at(index) is what is
  // compared.
  template <class NumberAt>
  void read_keys(int64_t begin, const NumberAt& number_at) {
    for (int64_t i = begin; i < count_; ++i) {
      const Stored number = number_at(indices_[i]);
      std::memcpy(keys_ + i, &number, sizeof(number));
    }
    for (int64_t i = begin; i < count_; i += kKeyLanes<Key>) {
      const auto keys = keys_of(bit_cast<typename Sum<Stored>::Lanes>(load_keys(keys_ + i)));
      std::memcpy(keys_ + i, &keys, sizeof(keys));
    }
  }

  // Keeps exactly the first k in the total order, of more than k, still by ascending index. Returns
  // the smallest key among them: a later element matters only if its key is larger.
  Key tighten() {
    pad(keys_, count_);
    const Range<Key> range = range_of(keys_, count_);
    const Bound<Key> bound = bisect(keys_, count_, k_, 0, range);
    // ties at an exact bound are taken from the left
    int64_t surplus = bound.at_least - k_;
    int64_t ties = surplus == 0 ? count_ : k_ - count_at_least<Key>(keys_, count_, bound.key + 1);
    int64_t kept = 0;
    Key smallest = range.high;
    for (int64_t i = 0; i < count_; ++i) {
      const Key key = keys_[i];
      if (key < bound.key || (surplus != 0 && key == bound.key && ties-- <= 0)) continue;
      smallest = key < smallest ? key : smallest;
      keys_[kept] = key;
      indices_[kept++] = indices_[i];
    }
    count_ = kept;
    return smallest;
  }

  // The indices of the first k, largest first; k <= kRankedByPairs, and the list is not long.
  void rank(int64_t* indices) {
    pad(keys_, count_);
    int64_t ordered[2 * kRankedByPairs + kRarelyTightened];
    rank_keys(keys_, count_, [&](int64_t i, int64_t rank) { ordered[rank] = indices_[i]; });
    std::memcpy(indices, ordered, static_cast<size_t>(k_) * sizeof(int64_t));
  }

 private:
  static constexpr int64_t kCapacity = 3 * kCandidateK<Stored> + kWord;

  int64_t k_, count_ = 0;
  alignas(kCacheLineBytes) Key keys_[kCapacity + kFloatLanes];
  uint32_t indices_[kCapacity + 1];
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
