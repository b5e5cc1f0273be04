// How often each latent fired: a histogram of the indices.
#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/indices.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/numbers.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// A thread keeps its own histogram of n latents; it must have this many entries per latent, or
// clearing and adding up the histograms costs more than the counting it saves.
constexpr int64_t kEntriesPerLatent = 2;
constexpr double kNanosecondsPerEntry = 1;

struct Always {
  bool operator()(int64_t) const { return true; }
};
// Whether the value is not zero, of either sign. NaN is not zero.
template <class Values>
struct NotZero {
  const Values* values;
  bool operator()(int64_t e) const { return to_sum(values[e]) != 0; }
};

// counts[i] += entries of latent i in [begin, end). Bound by the increments, which hit the caches.
template <class Index, class Fired, class Count>
void count_range(const Index* indices, int64_t begin, int64_t end, const Fired& fired,
                 Count* counts) {
  for (int64_t e = begin; e < end; ++e) counts[indices[e]] += fired(e);
}

// Each thread counts a slice of the entries on its own; then each adds up a slice of the latents.
template <class Index, class Fired>
void count_together(const Index* indices, int64_t count, const Fired& fired, int64_t n,
                    int64_t* counts, int team) {
  const Buffer<int64_t> histograms(n * team);
  in_parallel(team, [&](int t) {
    int64_t* own = histograms.get() + n * t;
    std::memset(own, 0, static_cast<size_t>(n) * sizeof(int64_t));
    const Share share = share_of(count, t, team);
    count_range(indices, share.begin, share.end, fired, own);
  });
  share_out(team, n, [&](int64_t i) {
    for (int t = 0; t < team; ++t) counts[i] += histograms.get()[n * t + i];
  });
}

template <class Index, class Fired>
void count(const Index* indices, int64_t count, const Fired& fired, int64_t n, int64_t* counts,
           int threads) {
  const int64_t most = n == 0 ? 1 : count / (kEntriesPerLatent * n);
  const int team = useful_threads(most < threads ? static_cast<int>(most) : threads,
                                  kNanosecondsPerEntry * static_cast<double>(count));
  if (team > 1) {
    count_together(indices, count, fired, n, counts, team);
  } else {
    count_range(indices, 0, count, fired, counts);
  }
}

}  // namespace

int64_t count_active(const CountActiveArguments& call, int threads) {
  const KeepDenormals mode;
  const Codes& codes = call.codes;
  return visit_indices("count_active", codes.indices, codes.index_type, [&](auto* indices) {
    const int64_t bad = first_bad_index(indices, codes.count(), call.n, threads);
    if (bad >= 0) return bad;
    if (codes.values == nullptr) {
      count(indices, codes.count(), Always{}, call.n, call.counts, threads);
      return bad;
    }
    visit_dtype("count_active", codes.dtype, [&](auto value) {
      using Values = decltype(value);
      const NotZero<Values> fired{static_cast<const Values*>(codes.values)};
      count(indices, codes.count(), fired, call.n, call.counts, threads);
    });
    return bad;
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
