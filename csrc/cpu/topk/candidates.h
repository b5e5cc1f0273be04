// Rows read once, in segments that fit the second-level cache, with a proved bound that only rises.
//
// Invariant after each segment: the candidates, in ascending index order, contain the k first
// elements, in the total order, of all that was read; k of them are >= bound, so a later element
// matters only if it is > bound. How a segment proves its bound: segment_maxima.h.
#pragma once

#include "cpu/topk/candidate_list.h"
#include "cpu/topk/segment_maxima.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// `Number` is what elements are compared as: float or double.
template <class Number>
class Candidates {
 public:
  using Key = typename Sum<Number>::Integer;

  // For rows of n elements, of which k <= kCandidateK are wanted.
  Candidates(int64_t n, int64_t k) : k_(k), maxima_(n, k), list_(k) {}

  void clear() {
    list_.clear();
    bounded_ = false;
  }
  int64_t segment() const { return maxima_.segment(); }
  Key* held_keys() { return maxima_.held_keys(); }
  int64_t count() const { return list_.count(); }
  uint32_t index(int64_t i) const { return list_.index(i); }
  Key key(int64_t i) const { return list_.key(i); }

  // Takes in x[0..count), count <= segment(), whose first element has index `base`. What lies
  // `ahead` elements further is fetched meanwhile; it need not exist.
  // Returns false, with the candidates unchanged, when the segment holds a NaN.
  template <bool kAbsolute, class Stored>
  bool read(const Stored* x, int64_t base, int64_t count, int64_t ahead) {
    if (!maxima_.template reduce<kAbsolute>(x, count, ahead)) return false;
    collect<kAbsolute>(x, count);
    append_hits<kAbsolute>(x, base);
    if (list_.is_long()) tighten();
    return true;
  }

  // Takes in one candidate of another instance, by ascending index.
  void add(Key key, uint32_t index) {
    if (!list_.has_room_for(1)) tighten();
    list_.append(key, index);
  }

  // Keeps exactly the first k in the total order, still by ascending index.
  void tighten() {
    if (list_.count() <= k_) return;
    bound_ = number_of(list_.tighten());
    bounded_ = true;
  }

  // The indices of the first k, largest first; k <= kRankedByPairs.
  void rank(int64_t* indices) {
    if (list_.is_long()) tighten();
    list_.rank(indices);
  }

 private:
  // Notes the segment's candidates; raises the bound first where the maxima prove a higher one.
  template <bool kAbsolute, class Stored>
  void collect(const Stored* x, int64_t count) {
    if (bounded_ && maxima_.groups_above(bound_) <= k_) return collect_above<kAbsolute>(x, count);
    const int64_t slack = k_ / 8 + 2;
    const Bound<Key> proved = maxima_.bound_for(k_, slack);
    if (bounded_ && number_of(proved.key) <= bound_) return collect_above<kAbsolute>(x, count);
    bound_ = number_of(proved.key);
    bounded_ = true;
    if (proved.at_least <= k_ + slack) {
      return maxima_.template collect<kAbsolute, true>(x, count, bound_, &hits_);
    }
    // Many equal maxima: what is above, and only as many ties as are missing.
    collect_above<kAbsolute>(x, count);
    const int64_t missing = k_ - hits_.count();
    if (missing <= 0) return;
    maxima_.template collect_with_ties<kAbsolute>(x, count, bound_, missing, &hits_);
  }

  template <bool kAbsolute, class Stored>
  void collect_above(const Stored* x, int64_t count) {
    maxima_.template collect<kAbsolute, false>(x, count, bound_, &hits_);
  }

  // Appends the elements that were noted. A tightening in between leaves some below the new bound
  // to be appended, which the next one removes.
  template <bool kAbsolute, class Stored>
  void append_hits(const Stored* x, int64_t base) {
    const auto number_at = [&](uint32_t index) {
      return compared<kAbsolute>(to_sum(x[index - base]));
    };
    int64_t begin = list_.count();
    for (int64_t w = 0; w < hits_.words; ++w) {
      if (!list_.has_room_for(kWord)) {
        list_.read_keys(begin, number_at);
        tighten();
        begin = list_.count();
      }
      list_.append_word(hits_.bits[w], base + hits_.starts[w]);
    }
    list_.read_keys(begin, number_at);
  }

  int64_t k_;
  bool bounded_ = false;  // whether there is a bound
  Number bound_ = 0;
  SegmentMaxima<Number> maxima_;
  CandidateList<Number> list_;
  Hits hits_;
};
static_assert(sizeof(Candidates<float>) <= 36 << 10 && sizeof(Candidates<double>) <= 36 << 10,
              "with 28 KiB of arrays on the stack 64 a thread");

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
