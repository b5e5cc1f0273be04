// Tensors [outer, channels, inner] in pieces, for sums over each channel.
//
// With a long inner dimension a piece is a part of one run of a channel. Otherwise it is some rows,
// where a row is a whole number of periods of channels * inner elements: as many periods as fill
// vectors evenly, if those are few, else one. Either way a vector's numbers per channel lie next to
// each other in an array that `spread` fills, at the `place` that is handed out with the vector.
#pragma once

#include <cstdint>

#include "cpu/common/channels.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

template <int kLanes>
class ChannelPieces {
 public:
  explicit ChannelPieces(const ChannelShape& shape)
      : shape_(shape), runs_(shape.inner >= kShortestRun) {
    const int64_t period = shape.channels * shape.inner;
    int64_t even = period;  // a multiple of kLanes, which is a power of two
    while (even % kLanes != 0) even *= 2;
    row_ = runs_ ? shape.inner : (even <= kLongestRow ? even : period);
    const int64_t rows = kPiece / row_ < 1 ? 1 : (kPiece / row_ < kRows ? kPiece / row_ : kRows);
    piece_ = runs_ ? kPiece : rows * row_;
    per_run_ = (shape.inner + piece_ - 1) / piece_;
    count_ =
        runs_ ? shape.outer * shape.channels * per_run_ : (shape.total() + piece_ - 1) / piece_;
  }

  const ChannelShape& shape() const { return shape_; }
  int64_t count() const { return count_; }
  // Of an array that `spread` fills.
  int64_t size() const { return runs_ ? shape_.channels * kLanes : row_ + kLanes; }
  // Of a row of sums, of which `channel_of` tells the channel.
  int64_t columns() const { return runs_ ? shape_.channels : row_; }
  int64_t channel_of(int64_t column) const {
    return runs_ ? column : column / shape_.inner % shape_.channels;
  }

  template <class T, class Value>
  void spread(T* places, Value&& value) const {
    for (int64_t place = 0; place < size(); ++place) {
      const int64_t channel =
          runs_ ? place / kLanes : place % row_ / shape_.inner % shape_.channels;
      places[place] = static_cast<T>(value(channel));
    }
  }

  // Calls visit(first, count, place) for the vectors of a piece, front to back.
  template <class Visit>
  void walk(int64_t piece, Visit&& visit) const {
    const Piece p = find(piece);
    const int64_t row = runs_ ? p.end - p.begin : row_;
    for (int64_t begin = p.begin; begin < p.end; begin += row) {
      const int64_t end = begin + row < p.end ? begin + row : p.end;
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) visit(i, kLanes, runs_ ? p.place : i - begin);
      if (i < end) visit(i, static_cast<int>(end - i), runs_ ? p.place : i - begin);
    }
  }

  // Adds a piece's sums to sums[s * columns() + column]. add(first, count, place, partial) adds a
  // vector's terms to partial[0..kSums), of which lanes from `count` on may hold anything.
  template <class Lanes, int kSums, class Add>
  void sum(int64_t piece, Add&& add, double* sums) const {
    const Piece p = find(piece);
    if (runs_) return sum_run<Lanes, kSums>(p, add, sums + p.place / kLanes);
    const int64_t rows = (p.end - p.begin) / row_, left = (p.end - p.begin) % row_;
    int64_t v = 0;
    for (; v + kWays * kLanes <= row_; v += kWays * kLanes) {
      sum_columns<Lanes, kSums, kWays>(p.begin + v, rows, kLanes, v, add, sums + v);
    }
    for (; v < row_; v += kLanes) {
      const int count = row_ - v < kLanes ? static_cast<int>(row_ - v) : kLanes;
      sum_columns<Lanes, kSums, 1>(p.begin + v, rows, count, v, add, sums + v);
    }
    for (v = 0; v < left; v += kLanes) {
      const int count = left - v < kLanes ? static_cast<int>(left - v) : kLanes;
      sum_columns<Lanes, kSums, 1>(p.begin + rows * row_ + v, 1, count, v, add, sums + v);
    }
  }

 private:
  static constexpr int kWays = 4;  // independent additions
  static constexpr int64_t kShortestRun = 4 * kLanes;
  static constexpr int64_t kLongestRow = 64 * kLanes;
  static constexpr int64_t kRows = 64;  // added up in a lane before they go to a double
  static constexpr int64_t kPiece = kRows * kWays * kLanes;

  struct Piece {
    int64_t begin, end, place;
  };

  Piece find(int64_t piece) const {
    if (!runs_) {
      const int64_t begin = piece * piece_, end = begin + piece_;
      return {begin, end < shape_.total() ? end : shape_.total(), 0};
    }
    const int64_t run = piece / per_run_, part = piece % per_run_ * piece_;
    const int64_t end = part + piece_ < shape_.inner ? part + piece_ : shape_.inner;
    return {run * shape_.inner + part, run * shape_.inner + end, run % shape_.channels * kLanes};
  }

  template <class Lanes, int kSums, int kVectors, class Add>
  void sum_columns(int64_t first, int64_t rows, int count, int64_t place, Add&& add,
                   double* sums) const {
    Lanes partial[kVectors][kSums] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int w = 0; w < kVectors; ++w) {
        add(first + r * row_ + w * kLanes, count, place + w * kLanes, partial[w]);
      }
    }
    for (int w = 0; w < kVectors; ++w) {
      for (int s = 0; s < kSums; ++s) {
        for (int lane = 0; lane < count; ++lane) {
          sums[s * columns() + w * kLanes + lane] += static_cast<double>(partial[w][s][lane]);
        }
      }
    }
  }

  template <class Lanes, int kSums, class Add>
  void sum_run(const Piece& p, Add&& add, double* sums) const {
    Lanes partial[kWays][kSums] = {}, last[kSums] = {};
    int64_t i = p.begin;
    for (; i + kWays * kLanes <= p.end; i += kWays * kLanes) {
      for (int w = 0; w < kWays; ++w) add(i + w * kLanes, kLanes, p.place, partial[w]);
    }
    for (; i + kLanes <= p.end; i += kLanes) add(i, kLanes, p.place, partial[0]);
    const int count = static_cast<int>(p.end - i);
    if (count > 0) add(i, count, p.place, last);
    for (int s = 0; s < kSums; ++s) {
      double total = 0;
      for (int w = 0; w < kWays; ++w) total += static_cast<double>(sum_lanes(partial[w][s]));
      for (int lane = 0; lane < count; ++lane) total += static_cast<double>(last[s][lane]);
      sums[s * columns()] += total;
    }
  }

  ChannelShape shape_;
  bool runs_;
  int64_t row_, piece_, per_run_, count_;
};

constexpr int64_t kElementsPerPart = 1 << 15;
constexpr double kNanosecondsPerSummed = 0.2;

// totals[s * channels + c] = the sum of add's terms over channel c; see ChannelPieces::sum. Pieces
// are dealt to a number of parts that depends on the shape alone, which are added up in order.
template <class Lanes, int kSums, int kLanes, class Add>
void channel_sums(const ChannelPieces<kLanes>& pieces, Add&& add, double* totals, int threads) {
  constexpr int64_t kMostParts = 16;
  const int64_t channels = pieces.shape().channels, width = kSums * pieces.columns();
  const int64_t total = pieces.shape().total();
  int64_t parts = total / kElementsPerPart + 1;
  parts = parts < kMostParts ? parts : kMostParts;
  const int team = useful_threads(threads < parts ? threads : static_cast<int>(parts),
                                  kNanosecondsPerSummed * static_cast<double>(total));
  const Buffer<double> sums(parts * width);
  std::memset(sums.get(), 0, static_cast<size_t>(parts * width) * sizeof(double));
  share_out(team, parts, [&](int64_t part) {
    const Share share = share_of(pieces.count(), static_cast<int>(part), static_cast<int>(parts));
    for (int64_t p = share.begin; p < share.end; ++p) {
      pieces.template sum<Lanes, kSums>(p, add, sums.get() + part * width);
    }
  });
  std::memset(totals, 0, static_cast<size_t>(kSums * channels) * sizeof(double));
  for (int64_t part = 0; part < parts; ++part) {
    for (int s = 0; s < kSums; ++s) {
      const double* own = sums.get() + part * width + s * pieces.columns();
      for (int64_t column = 0; column < pieces.columns(); ++column) {
        totals[s * channels + pieces.channel_of(column)] += own[column];
      }
    }
  }
}

// Calls visit(first, count, place) for every vector of the tensor.
template <int kLanes, class Visit>
void walk_pieces(const ChannelPieces<kLanes>& pieces, Visit&& visit, int threads) {
  const int team =
      useful_threads(threads, kNanosecondsPerSummed * static_cast<double>(pieces.shape().total()));
  share_out(team, pieces.count(), [&](int64_t p) { pieces.walk(p, visit); });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
