// Batch normalisation: passes over memory with numbers per channel beside them.

#include <cmath>

#include "cpu/common/buffer.h"
#include "cpu/common/channel_sums.h"
#include "cpu/common/dtypes.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// Numbers per channel where the vectors of a tensor find them.
template <class Stored>
class Spread {
 public:
  using Scalar = typename Sum<Stored>::Scalar;

  template <class Value>
  Spread(const ChannelPieces<Sum<Stored>::kLanes>& pieces, Value&& value) : places_(pieces.size()) {
    pieces.spread(places_.get(), value);
  }
  typename Sum<Stored>::Lanes operator[](int64_t place) const {
    return load(places_.get() + place);
  }

 private:
  Buffer<Scalar> places_;
};

template <class Scalar>
double at_or(const Scalar* numbers, int64_t channel, double missing) {
  return numbers == nullptr ? missing : static_cast<double>(numbers[channel]);
}

// Reads x twice for the moments, since the variance is that around the mean, and once to write z.
// The second reading also tells what the first mean was off by.
template <class Stored, class Scalar>
void forward(const Stored* x, const ChannelShape& shape, const Scalar* weight, const Scalar* bias,
             double eps, Stored* z, Scalar* mean, Scalar* var, int threads) {
  using Lanes = typename Sum<Stored>::Lanes;
  const ChannelPieces<Sum<Stored>::kLanes> pieces(shape);
  const double n = static_cast<double>(shape.per_channel());
  const Buffer<double> totals(2 * shape.channels);

  channel_sums<Lanes, 1>(
      pieces,
      [x](int64_t first, int count, int64_t, Lanes* sums) {
        sums[0] += load_some(x + first, count);
      },
      totals.get(), threads);
  for (int64_t c = 0; c < shape.channels; ++c) mean[c] = static_cast<Scalar>(totals.get()[c] / n);
  const Spread<Stored> first_means(pieces, [mean](int64_t c) { return mean[c]; });

  channel_sums<Lanes, 2>(
      pieces,
      [x, &first_means](int64_t first, int count, int64_t place, Lanes* sums) {
        const Lanes away = load_some(x + first, count) - first_means[place];
        sums[0] += away;
        sums[1] = multiply_add(away, away, sums[1]);
      },
      totals.get(), threads);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const double off = totals.get()[c] / n;
    mean[c] = static_cast<Scalar>(static_cast<double>(mean[c]) + off);
    const double square = totals.get()[shape.channels + c] / n - off * off;
    var[c] = static_cast<Scalar>(square < 0 ? 0 : square);  // NaN stays
  }
  const Spread<Stored> means(pieces, [mean](int64_t c) { return mean[c]; });

  const Spread<Stored> scales(pieces, [=](int64_t c) {
    return at_or(weight, c, 1) / std::sqrt(static_cast<double>(var[c]) + eps);
  });
  const Spread<Stored> shifts(pieces, [=](int64_t c) { return at_or(bias, c, 0); });
  walk_pieces(
      pieces,
      [&](int64_t first, int count, int64_t place) {
        const Lanes away = load_some(x + first, count) - means[place];
        store_some(z + first, multiply_add(away, scales[place], shifts[place]), count);
      },
      threads);
}

// With g the gradient of z, S = sum g, T = sum g (x - mean) and r = 1 / sqrt(var + eps):
// dx = w r (g - S / n - (x - mean) r^2 T / n), dw = r T, db = S.
template <class Stored, class Scalar>
void backward(const Stored* grad, const Stored* x, const ChannelShape& shape, const Scalar* weight,
              const Scalar* mean, const Scalar* var, double eps, Stored* grad_x,
              Scalar* grad_weight, Scalar* grad_bias, int threads) {
  using Lanes = typename Sum<Stored>::Lanes;
  const ChannelPieces<Sum<Stored>::kLanes> pieces(shape);
  const double n = static_cast<double>(shape.per_channel());
  const Buffer<double> totals(2 * shape.channels);
  const double* plain = totals.get();
  const double* centred = totals.get() + shape.channels;
  const Spread<Stored> means(pieces, [mean](int64_t c) { return mean[c]; });
  const auto root = [=](int64_t c) { return 1 / std::sqrt(static_cast<double>(var[c]) + eps); };

  channel_sums<Lanes, 2>(
      pieces,
      [grad, x, &means](int64_t first, int count, int64_t place, Lanes* sums) {
        const Lanes g = load_some(grad + first, count);
        sums[0] += g;
        sums[1] = multiply_add(g, load_some(x + first, count) - means[place], sums[1]);
      },
      totals.get(), threads);
  for (int64_t c = 0; c < shape.channels; ++c) {
    grad_weight[c] = static_cast<Scalar>(root(c) * centred[c]);
    grad_bias[c] = static_cast<Scalar>(plain[c]);
  }

  const auto scale = [=](int64_t c) { return at_or(weight, c, 1) * root(c); };
  const Spread<Stored> scales(pieces, scale);
  const Spread<Stored> slopes(
      pieces, [=](int64_t c) { return -scale(c) * root(c) * root(c) * centred[c] / n; });
  const Spread<Stored> shifts(pieces, [=](int64_t c) { return -scale(c) * plain[c] / n; });
  walk_pieces(
      pieces,
      [&](int64_t first, int count, int64_t place) {
        const Lanes away = load_some(x + first, count) - means[place];
        const Lanes rest = multiply_add(away, slopes[place], shifts[place]);
        const Lanes g = load_some(grad + first, count);
        store_some(grad_x + first, multiply_add(g, scales[place], rest), count);
      },
      threads);
}

}  // namespace

void batch_norm(const BatchNormArguments& call, int threads) {
  visit_dtype("batch_norm", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using Scalar = typename Sum<Stored>::Scalar;
    forward(static_cast<const Stored*>(call.x.data), shape_of(call.x),
            static_cast<const Scalar*>(call.weight), static_cast<const Scalar*>(call.bias),
            call.eps, static_cast<Stored*>(call.z), static_cast<Scalar*>(call.mean),
            static_cast<Scalar*>(call.var), threads);
  });
}

void batch_norm_backward(const BatchNormBackwardArguments& call, int threads) {
  visit_dtype("batch_norm_backward", call.x.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using Scalar = typename Sum<Stored>::Scalar;
    backward(static_cast<const Stored*>(call.grad), static_cast<const Stored*>(call.x.data),
             shape_of(call.x), static_cast<const Scalar*>(call.weight),
             static_cast<const Scalar*>(call.mean), static_cast<const Scalar*>(call.var), call.eps,
             static_cast<Stored*>(call.grad_x), static_cast<Scalar*>(call.grad_weight),
             static_cast<Scalar*>(call.grad_bias), threads);
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
