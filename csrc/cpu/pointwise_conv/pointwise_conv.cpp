// The 1x1 convolution of a sparse tensor: bias everywhere, and what the codes add.
#include "cpu/common/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/pointwise_conv/places.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// The sums of a row or block, rounded and written past the caches: the output is far larger than
// they are, and whoever reads it next starts at its front.
template <class Scalar, class Stored>
void write_past_caches(const Scalar* sums, int64_t count, Stored* out) {
  constexpr int kLanes = Sum<Stored>::kLanes;
  int64_t i = 0;
  if constexpr (sizeof(Stored) * kLanes == kCacheLineBytes) {  // up to the next whole line
    const int64_t misplaced = reinterpret_cast<uintptr_t>(out) % kCacheLineBytes / sizeof(Stored);
    const int64_t head = misplaced == 0 ? 0 : kLanes - misplaced;
    for (; i < head && i < count; ++i) from_sum(sums[i], out + i);
  }
  for (; i + kLanes <= count; i += kLanes) store_past_caches(out + i, load(sums + i));
  for (; i < count; ++i) from_sum(sums[i], out + i);
}

template <class Stored, class Weight>
struct Forward {
  using Scalar = typename Sum<Stored>::Scalar;

  const Stored* values;
  const Places& places;
  ChannelShape shape;
  StoredWeight<Weight> weight;
  const Weight* bias;
  int64_t outputs;
  Stored* out;
  int threads;

  Scalar bias_of(int64_t output) const {
    return bias == nullptr ? Scalar{0} : static_cast<Scalar>(to_sum(bias[output]));
  }
  Scalar weight_of(int64_t output, int64_t channel) const {
    return static_cast<Scalar>(weight(output, channel));
  }
  Scalar value_of(const Place& place) const { return to_sum(values[place.code]); }

  // For so many rows or blocks.
  int team_of(int64_t pieces) const {
    const double elements = static_cast<double>(shape.outer * shape.inner + places.count());
    return useful_threads(threads < pieces ? threads : static_cast<int>(pieces),
                          kNanosecondsPerOutput * elements * static_cast<double>(outputs));
  }

  // A row [inner] of one output at a time, in the first-level cache. Bound by writing out.
  void by_rows() const {
    const int64_t rows = shape.outer * outputs;
    const int team = team_of(rows);
    in_parallel(team, [&](int member) {
      const Buffer<Scalar> row(shape.inner);
      const Share share = share_of(rows, member, team);
      for (int64_t r = share.begin; r < share.end; ++r) {
        const int64_t o = r / outputs, e = r % outputs;
        const Scalar start = bias_of(e);
        for (int64_t s = 0; s < shape.inner; ++s) row.get()[s] = start;
        for (const Place* p = places.begin(o); p != places.end(o); ++p) {
          row.get()[p->inner] += value_of(*p) * weight_of(e, p->channel);
        }
        write_past_caches(row.get(), shape.inner, out + r * shape.inner);
      }
      fence_past_caches();
    });
  }

  // A block [outputs, inner] at a time; one without codes is the bias. Bound by writing out.
  void by_blocks() const {
    const int64_t size = outputs * shape.inner;
    const Buffer<Scalar> empty(size);
    for (int64_t i = 0; i < size; ++i) empty.get()[i] = bias_of(i / shape.inner);
    const int team = team_of(shape.outer);
    in_parallel(team, [&](int member) {
      const Buffer<Scalar> block(size);
      const Share share = share_of(shape.outer, member, team);
      for (int64_t o = share.begin; o < share.end; ++o) {
        const Scalar* sums = empty.get();
        if (places.count(o) > 0) {
          std::memcpy(block.get(), sums, static_cast<size_t>(size) * sizeof(Scalar));
          for (const Place* p = places.begin(o); p != places.end(o); ++p) add(*p, block.get());
          sums = block.get();
        }
        write_past_caches(sums, size, out + o * size);
      }
      fence_past_caches();
    });
  }

  void add(const Place& place, Scalar* block) const {
    const Scalar value = value_of(place);
    for (int64_t e = 0; e < outputs; ++e) {
      block[e * shape.inner + place.inner] += value * weight_of(e, place.channel);
    }
  }
};

}  // namespace

void pointwise_conv(const PointwiseConvArguments& call, int threads) {
  const Codes& codes = call.codes;
  const Matrix& matrix = call.weight;
  const ChannelShape shape{call.outer, matrix.columns, call.inner};
  visit_indices("pointwise_conv", codes.indices, codes.index_type, [&](auto* indices) {
    const Places places(indices, codes.count(), shape);
    visit_dtypes("pointwise_conv", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
      using Stored = decltype(value);
      using Weight = decltype(weight);
      const Forward<Stored, Weight> forward{static_cast<const Stored*>(codes.values),
                                            places,
                                            shape,
                                            {matrix},
                                            static_cast<const Weight*>(call.bias),
                                            matrix.rows,
                                            static_cast<Stored*>(call.out),
                                            threads};
      matrix.rows* call.inner <= kLargestBlock ? forward.by_blocks() : forward.by_rows();
    });
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
