// Backward with a row-major dictionary: both gradients in one pass over the latents.
// Column-major: columns_backward.h.
#include <type_traits>

#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"
#include "cpu/sparse_matmul/columns_backward.h"
#include "cpu/sparse_matmul/gradients.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// Reading a dictionary row and writing its gradient row cost about as much as this many entries,
// whose rows of the upstream gradient mostly come from the cache.
constexpr int64_t kLatentCost = 3;
// Tasks per thread: enough to even out a slow core, few enough to keep each a long stream.
constexpr int64_t kTasksPerThread = 16;
constexpr double kNanosecondsPerMultiplyAdd = 0.1;
// Features in the narrowest slice of a heavy latent: four cache lines of float32.
constexpr int64_t kSliceFeatures = 64;
// A piece of the pass. Either whole latents, or one part of a latent too heavy for one thread:
// some features of its gradient row, or the gradients of some of its values.
struct Task {
  enum Kind { kLatents, kFeatures, kEntries } kind;
  int64_t latent;  // the heavy latent, or the first of the range
  int64_t begin, end;
};

// The tasks of a pass, cut by the cost of the entries and rows in them. How they are cut changes no
// result: every output element is computed by one task, in an order that is the same in all cuts.
class Schedule {
 public:
  Schedule(const int64_t* offsets, int64_t n, int64_t d, int team)
      : tasks_(8 * kTasksPerThread * team + 8) {
    if (team == 1) {
      add({Task::kLatents, 0, 0, n});
      return;
    }
    const int64_t total = offsets[n] + kLatentCost * n;
    const int64_t target = total / (kTasksPerThread * team) + 1;
    int64_t begin = 0;
    int64_t cost = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t entries = offsets[i + 1] - offsets[i];
      if (entries > 2 * target) {
        if (begin < i) add({Task::kLatents, begin, begin, i});
        split(i, offsets[i], offsets[i + 1], d, target);
        begin = i + 1;
        cost = 0;
        continue;
      }
      cost += entries + kLatentCost;
      if (cost < target && i + 1 < n) continue;
      add({Task::kLatents, begin, begin, i + 1});
      begin = i + 1;
      cost = 0;
    }
    if (begin < n) add({Task::kLatents, begin, begin, n});
  }
  int64_t size() const { return size_; }
  const Task& operator[](int64_t task) const { return tasks_.get()[task]; }

 private:
  void add(const Task& task) { tasks_.get()[size_++] = task; }

  void split(int64_t latent, int64_t first, int64_t last, int64_t d, int64_t target) {
    const int64_t parts = (last - first) / target;
    for (int64_t part = 0; part < parts; ++part) {
      add({Task::kEntries, latent, first + (last - first) * part / parts,
           first + (last - first) * (part + 1) / parts});
    }
    const int64_t slices = (d + kSliceFeatures - 1) / kSliceFeatures;
    const int64_t wide = slices < parts ? slices : parts;
    for (int64_t slice = 0; slice < wide; ++slice) {
      const int64_t end = slices * (slice + 1) / wide * kSliceFeatures;
      add({Task::kFeatures, latent, slices * slice / wide * kSliceFeatures, end < d ? end : d});
    }
  }

  // At most 1 + tasks of whole latents per target, one more per heavy latent (of which there are at
  // most half as many), and two parts per target of a heavy latent.
  Buffer<Task> tasks_;
  int64_t size_ = 0;
};

// grad_values and grad_weight of the entries [begin, end) and the features [feature, feature +
// width) of one latent. A thread owns whole latents (or parts of a heavy one); it reads the
// latent's dictionary row once, gathers the upstream gradient's row of each entry and writes the
// gradient row once, its sums in the L1 or L2 cache meanwhile (in `scratch` if they are wider than
// what is stored). Bound by memory: one dictionary row in, one gradient row out, and the gathered
// rows from the last cache level. Stores past the caches were slower, most of all into fresh pages.
template <bool kDots, bool kSums, class Values, class Weight, class Scalar>
void differentiate_latent(const Gradients<Values, Weight>& p, int64_t latent, int64_t begin,
                          int64_t end, int64_t feature, int64_t width, Scalar* scratch) {
  constexpr int kLanes = Sum<Values>::kLanes;
  const Weight* row = p.weight + latent * p.stride_n + feature;
  Weight* out = kSums ? p.grad_weight + latent * p.grad_stride_n + feature : nullptr;
  const auto take = [&](int64_t place, Scalar dot) {
    from_sum(dot, p.grad_values + p.positions[place]);
  };
  if constexpr (std::is_same_v<Weight, Scalar>) {
    differentiate_entries<kDots, kSums>(p, begin, end, feature, width, row, out, take);
  } else {
    differentiate_entries<kDots, kSums>(p, begin, end, feature, width, row, scratch, take);
    int64_t f = 0;
    for (; f + kLanes <= width && kSums; f += kLanes) store(out + f, load(scratch + f));
    if (f < width && kSums) store_partial(out + f, load(scratch + f), width - f);
  }
}

template <bool kDots, bool kSums, class Values, class Weight, class Scalar>
void run_task(const Gradients<Values, Weight>& p, const Task& task, Scalar* scratch) {
  if (task.kind == Task::kLatents) {
    for (int64_t i = task.begin; i < task.end; ++i) {
      differentiate_latent<kDots, kSums>(p, i, p.offsets[i], p.offsets[i + 1], 0, p.d, scratch);
    }
  } else if (task.kind == Task::kFeatures) {
    if (!kSums) return;
    differentiate_latent<false, kSums>(p, task.latent, p.offsets[task.latent],
                                       p.offsets[task.latent + 1], task.begin,
                                       task.end - task.begin, scratch);
  } else if (kDots) {
    differentiate_latent<kDots, false>(p, task.latent, task.begin, task.end, 0, p.d, scratch);
  }
}

template <bool kDots, bool kSums, class Values, class Weight>
void differentiate_rows(const Gradients<Values, Weight>& p, int threads) {
  using Scalar = typename Sum<Values>::Scalar;
  const double work = static_cast<double>(p.offsets[p.n] + kLatentCost * p.n);
  const int team =
      useful_threads(threads, kNanosecondsPerMultiplyAdd * work * static_cast<double>(p.d));
  const Schedule schedule(p.offsets, p.n, p.d, team);
  // Whole vectors, and at least a cache line between two threads.
  const int64_t padded = (p.d / kSliceFeatures + 2) * kSliceFeatures;
  const Buffer<Scalar> scratch(team * padded);
  deal_out(team, schedule.size(), 1, [&](int64_t task, int member) {
    run_task<kDots, kSums>(p, schedule[task], scratch.get() + member * padded);
  });
}

template <bool kDots, bool kSums, class Values, class Weight>
void differentiate(const Gradients<Values, Weight>& p, int threads) {
  const bool rows = p.d == 1 || (p.stride_d == 1 && (!kSums || p.grad_stride_d == 1));
  if (rows) {
    differentiate_rows<kDots, kSums>(p, threads);
  } else {
    differentiate_columns<kDots, kSums>(p, threads);
  }
}

}  // namespace

bool sparse_matmul_backward(const SparseMatmulBackwardArguments& call, int threads) {
  const Codes& codes = call.codes;
  const Matrix &matrix = call.weight, &gradient = call.grad_weight;
  if (codes.indices != nullptr) {
    const IndexList indices{codes.indices, codes.index_type, codes.count()};
    if (!is_transposition({indices, matrix.rows, call.offsets, call.positions}, threads)) {
      return false;
    }
  }
  visit_dtypes("sparse_matmul_backward", codes.dtype, matrix.dtype, [&](auto value, auto weight) {
    using Values = decltype(value);
    using Weight = decltype(weight);
    const Gradients<Values, Weight> p{
        static_cast<const Values*>(call.grad),
        static_cast<const Values*>(codes.values),
        codes.k,
        static_cast<const Weight*>(matrix.data),
        matrix.rows,
        matrix.columns,
        matrix.row_stride,
        matrix.column_stride,
        call.offsets,
        call.positions,
        static_cast<Values*>(call.grad_values),
        static_cast<Weight*>(gradient.data),
        gradient.row_stride,
        gradient.column_stride,
    };
    if (p.grad_weight != nullptr) {
      advise_huge_pages(p.grad_weight, static_cast<size_t>(p.n * p.d) * sizeof(Weight));
    }
    if (p.grad_values != nullptr && p.grad_weight != nullptr) {
      differentiate<true, true>(p, threads);
    } else if (p.grad_values != nullptr) {
      differentiate<true, false>(p, threads);
    } else if (p.grad_weight != nullptr) {
      differentiate<false, true>(p, threads);
    }
  });
  return true;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
