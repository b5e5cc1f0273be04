// The gradients of the 1x1 convolution of a sparse tensor: one pass over the output's gradient for
// the bias, and what the codes take from it.
#include "cpu/common/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/pointwise_conv/places.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// Sums are split in the same way for every thread count: a share of the outputs each for the
// gradients of values, a share of the blocks each for that of the bias.
constexpr int64_t kOutputsPerShare = 16;
constexpr int64_t kBlocksPerShare = 256;
// An element of grad that a code picks.
constexpr double kNanosecondsPerGathered = 1;

template <class Stored, class Weight>
struct Backward {
  using Scalar = typename Sum<Stored>::Scalar;
  using Lanes = typename Sum<Stored>::Lanes;
  static constexpr int kLanes = Sum<Stored>::kLanes;

  const Stored* grad;
  const Stored* values;
  const Places& places;
  int64_t count;
  ChannelShape shape;
  StoredWeight<Weight> weight;
  int64_t outputs;
  Stored* grad_values;
  Weight* grad_weight;  // [outputs, channels]
  Weight* grad_bias;
  int threads;

  Scalar weight_of(int64_t output, int64_t channel) const {
    return static_cast<Scalar>(weight(output, channel));
  }

  // For so many shares of a pass over grad.
  int team_of(int64_t shares) const {
    const double elements = static_cast<double>(shape.outer * shape.inner + count);
    return useful_threads(threads < shares ? threads : static_cast<int>(shares),
                          kNanosecondsPerOutput * elements * static_cast<double>(outputs));
  }

  static Scalar sum_of(const Stored* p, int64_t n) {
    Lanes sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) sums[u] += load(p + i + u * kLanes);
    }
    Scalar sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += to_sum(p[i]);
    return sum;
  }

  // Row [inner] by row, each summed and looked into while the caches hold it. Bound by reading
  // grad.
  void by_rows() const {
    const int64_t shares = (outputs + kOutputsPerShare - 1) / kOutputsPerShare;
    const int team = team_of(shares);
    const Buffer<Scalar> of_values(shares * count);
    std::memset(of_values.get(), 0, static_cast<size_t>(shares * count) * sizeof(Scalar));
    in_parallel(team, [&](int member) {
      const Buffer<Scalar> of_weight(shape.channels);
      const Share own = share_of(shares, member, team);
      for (int64_t share = own.begin; share < own.end; ++share) {
        const int64_t last = (share + 1) * kOutputsPerShare;
        for (int64_t e = share * kOutputsPerShare; e < last && e < outputs; ++e) {
          output_by_rows(e, of_weight.get(), of_values.get() + share * count);
        }
      }
    });
    const double added = static_cast<double>(count) * static_cast<double>(shares);
    share_out(useful_threads(threads, kNanosecondsPerOutput * added), count, [&](int64_t m) {
      Scalar sum = 0;
      for (int64_t share = 0; share < shares; ++share) sum += of_values.get()[share * count + m];
      from_sum(sum, grad_values + m);
    });
  }

  void output_by_rows(int64_t e, Scalar* of_weight, Scalar* of_values) const {
    for (int64_t c = 0; c < shape.channels; ++c) of_weight[c] = 0;
    Scalar of_bias = 0;
    for (int64_t o = 0; o < shape.outer; ++o) {
      const Stored* row = grad + (o * outputs + e) * shape.inner;
      of_bias += sum_of(row, shape.inner);
      for (const Place* p = places.begin(o); p != places.end(o); ++p) {
        const Scalar g = to_sum(row[p->inner]);
        of_weight[p->channel] += g * to_sum(values[p->code]);
        of_values[p->code] += g * weight_of(e, p->channel);
      }
    }
    for (int64_t c = 0; c < shape.channels; ++c) {
      from_sum(of_weight[c], grad_weight + e * shape.channels + c);
    }
    from_sum(of_bias, grad_bias + e);
  }

  // Blocks [outputs, inner] are summed as wholes. Bound by reading grad.
  void by_blocks() const {
    const int64_t size = outputs * shape.inner;
    const int64_t shares = (shape.outer + kBlocksPerShare - 1) / kBlocksPerShare;
    const Buffer<Scalar> sums(shares * size);
    std::memset(sums.get(), 0, static_cast<size_t>(shares * size) * sizeof(Scalar));
    share_out(team_of(shares), shares, [&](int64_t share) {
      const int64_t last = (share + 1) * kBlocksPerShare;
      for (int64_t o = share * kBlocksPerShare; o < last && o < shape.outer; ++o) {
        add_block(grad + o * size, size, sums.get() + share * size);
      }
    });
    const double gathered = static_cast<double>(count) * static_cast<double>(outputs);
    const int team = useful_threads(threads, kNanosecondsPerGathered * gathered);
    share_out(team, outputs, [&](int64_t e) {
      Scalar sum = 0;
      for (int64_t share = 0; share < shares; ++share) {
        const Scalar* part = sums.get() + share * size + e * shape.inner;
        for (int64_t s = 0; s < shape.inner; ++s) sum += part[s];
      }
      from_sum(sum, grad_bias + e);
      weight_by_blocks(e);
    });
    share_out(team, count, [&](int64_t m) { value_by_blocks(places.begin()[m]); });
  }

  static void add_block(const Stored* block, int64_t size, Scalar* sums) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(sums + i, load(sums + i) + load(block + i));
    for (; i < size; ++i) sums[i] += to_sum(block[i]);
  }

  Scalar grad_at(int64_t e, const Place& place) const {
    return to_sum(grad[(place.outer * outputs + e) * shape.inner + place.inner]);
  }

  void weight_by_blocks(int64_t e) const {
    const Buffer<Scalar> sums(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) sums.get()[c] = 0;
    for (const Place* p = places.begin(); p != places.end(); ++p) {
      sums.get()[p->channel] += grad_at(e, *p) * to_sum(values[p->code]);
    }
    for (int64_t c = 0; c < shape.channels; ++c) {
      from_sum(sums.get()[c], grad_weight + e * shape.channels + c);
    }
  }

  void value_by_blocks(const Place& place) const {
    Scalar sum = 0;
    for (int64_t e = 0; e < outputs; ++e) {
      sum += grad_at(e, place) * weight_of(e, place.channel);
    }
    from_sum(sum, grad_values + place.code);
  }
};

}  // namespace

void pointwise_conv_backward(const PointwiseConvBackwardArguments& call, int threads) {
  const Codes& codes = call.codes;
  const Matrix& matrix = call.weight;
  const ChannelShape shape{call.outer, matrix.columns, call.inner};
  visit_indices("pointwise_conv_backward", codes.indices, codes.index_type, [&](auto* indices) {
    const Places places(indices, codes.count(), shape);
    visit_dtypes(
        "pointwise_conv_backward", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
          using Stored = decltype(value);
          using Weight = decltype(weight);
          const Backward<Stored, Weight> backward{static_cast<const Stored*>(call.grad),
                                                  static_cast<const Stored*>(codes.values),
                                                  places,
                                                  codes.count(),
                                                  shape,
                                                  {matrix},
                                                  matrix.rows,
                                                  static_cast<Stored*>(call.grad_values),
                                                  static_cast<Weight*>(call.grad_weight),
                                                  static_cast<Weight*>(call.grad_bias),
                                                  threads};
          matrix.rows* call.inner <= kLargestBlock ? backward.by_blocks() : backward.by_rows();
        });
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
