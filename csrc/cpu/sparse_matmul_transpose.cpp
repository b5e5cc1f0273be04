// Transposition of codes: a stable counting sort of the flat positions by latent.
#include "indices.h"
#include "lanes.h"
#include "sparse_matmul.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// A thread keeps its own histogram of n latents; it must have this many entries per latent, or
// clearing and adding up the histograms costs more than the sorting it saves.
constexpr int64_t kEntriesPerLatent = 2;
constexpr int64_t kEntriesPerThread = 1 << 15;

// One thread. offsets[i + 1] serves as the cursor of latent i and ends as the end of its list.
// Bound by the random accesses into offsets (n * 8 bytes, usually in the L2 cache).
template <class Index>
void sort_alone(const Index* indices, int64_t count, int64_t n, int64_t* offsets,
                int32_t* positions) {
  std::memset(offsets, 0, static_cast<size_t>(n + 1) * sizeof(int64_t));
  int64_t* cursor = offsets + 1;
  for (int64_t e = 0; e < count; ++e) ++cursor[indices[e]];
  int64_t start = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t entries = cursor[i];
    cursor[i] = start;
    start += entries;
  }
  for (int64_t e = 0; e < count; ++e) positions[cursor[indices[e]]++] = static_cast<int32_t>(e);
}

// A team. Thread t owns the t-th slice of the entries and its own histogram; the start of its part
// of latent i's list lies after the parts of all smaller latents and of all earlier threads, which
// is where the sequential sort would have put it. So the lists do not depend on the team's size.
template <class Index>
void sort_together(const Index* indices, int64_t count, int64_t n, int64_t* offsets,
                   int32_t* positions, int team) {
  const Buffer<int32_t> histograms(n * team);
  const Buffer<int64_t> slice_sums(team + 1);
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int t = 0; t < team; ++t) {
    int32_t* histogram = histograms.get() + n * t;
    std::memset(histogram, 0, static_cast<size_t>(n) * sizeof(int32_t));
    const int64_t end = count * (t + 1) / team;
    for (int64_t e = count * t / team; e < end; ++e) ++histogram[indices[e]];
  }
  // Entries in each slice of the latents, then each slice's cursors.
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int s = 0; s < team; ++s) {
    int64_t sum = 0;
    for (int t = 0; t < team; ++t) {
      const int32_t* histogram = histograms.get() + n * t;
      for (int64_t i = n * s / team; i < n * (s + 1) / team; ++i) sum += histogram[i];
    }
    slice_sums.get()[s] = sum;
  }
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int s = 0; s < team; ++s) {
    int64_t start = 0;
    for (int earlier = 0; earlier < s; ++earlier) start += slice_sums.get()[earlier];
    for (int64_t i = n * s / team; i < n * (s + 1) / team; ++i) {
      offsets[i] = start;
      for (int t = 0; t < team; ++t) {
        int32_t* entries = histograms.get() + n * t + i;
        const int32_t here = *entries;
        *entries = static_cast<int32_t>(start);
        start += here;
      }
    }
  }
  offsets[n] = count;
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int t = 0; t < team; ++t) {
    int32_t* cursor = histograms.get() + n * t;
    const int64_t end = count * (t + 1) / team;
    for (int64_t e = count * t / team; e < end; ++e) {
      positions[cursor[indices[e]]++] = static_cast<int32_t>(e);
    }
  }
}

}  // namespace

int64_t transpose_codes(const void* indices, int index_tag, int64_t count, int64_t n,
                        int64_t* offsets, int32_t* positions, int threads) {
  return visit_indices(indices, index_tag, [&](auto* typed) {
    const int64_t bad = first_bad_index(typed, count, n, threads);
    if (bad >= 0) return bad;
    const int64_t per_thread =
        kEntriesPerLatent * n > kEntriesPerThread ? kEntriesPerLatent * n : kEntriesPerThread;
    const int64_t deserved = count / per_thread;
    if (threads > 1 && deserved > 1) {
      const int team = static_cast<int>(deserved < threads ? deserved : threads);
      sort_together(typed, count, n, offsets, positions, team);
    } else {
      sort_alone(typed, count, n, offsets, positions);
    }
    return bad;
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
