// Transposition of codes: a stable counting sort of the flat positions by latent.
#include "cpu/common/buffer.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/indices.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

namespace {

// A thread keeps its own histogram of n latents; it must have this many entries per latent, or
// clearing and adding up the histograms costs more than the sorting it saves.
constexpr int64_t kEntriesPerLatent = 2;
constexpr double kNanosecondsPerEntry = 2;

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
  in_parallel(team, [&](int t) {
    int32_t* histogram = histograms.get() + n * t;
    std::memset(histogram, 0, static_cast<size_t>(n) * sizeof(int32_t));
    const int64_t end = count * (t + 1) / team;
    for (int64_t e = count * t / team; e < end; ++e) ++histogram[indices[e]];
  });
  // Entries in each slice of the latents, then each slice's cursors.
  in_parallel(team, [&](int s) {
    int64_t sum = 0;
    for (int t = 0; t < team; ++t) {
      const int32_t* histogram = histograms.get() + n * t;
      for (int64_t i = n * s / team; i < n * (s + 1) / team; ++i) sum += histogram[i];
    }
    slice_sums.get()[s] = sum;
  });
  in_parallel(team, [&](int s) {
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
  });
  offsets[n] = count;
  in_parallel(team, [&](int t) {
    int32_t* cursor = histograms.get() + n * t;
    const int64_t end = count * (t + 1) / team;
    for (int64_t e = count * t / team; e < end; ++e) {
      positions[cursor[indices[e]]++] = static_cast<int32_t>(e);
    }
  });
}

// latents[e] = the latent of the e-th listed entry. Whether entries are listed by latent, and
// ascending inside one. Bound by gathering the indices.
template <class Index>
bool list_latents(const Index* indices, int64_t count, int64_t n, const int32_t* positions,
                  Share share, int32_t* latents) {
  int64_t before = -1;
  uint64_t wrong = 0;  // the sign bit tells
  // Read in order first: gathering from memory took three times as long as from the caches.
  constexpr int64_t kStep = kCacheLineBytes / static_cast<int64_t>(sizeof(Index));
  for (int64_t i = 0; i < count; i += kStep) {
    wrong |= static_cast<uint64_t>(static_cast<int64_t>(indices[i]));
  }
  // The last entry of the share before is only compared with.
  for (int64_t e = share.begin == 0 ? 0 : share.begin - 1; e < share.end; ++e) {
    uint64_t position = static_cast<uint32_t>(positions[e]);
    wrong |= static_cast<uint64_t>(count - 1) - position;
    position = position < static_cast<uint64_t>(count) ? position : 0;
    const uint64_t latent = static_cast<uint64_t>(static_cast<int64_t>(indices[position]));
    wrong |= latent | (static_cast<uint64_t>(n - 1) - latent);
    const int64_t place = static_cast<int64_t>(latent << 32 | position);
    wrong |= ~(static_cast<uint64_t>(before) - static_cast<uint64_t>(place));  // before < place
    before = place;
    if (e >= share.begin) latents[e] = static_cast<int32_t>(latent);
  }
  return (wrong >> 63) == 0;
}

}  // namespace

int64_t transpose_codes(const TransposeCodesArguments& call, int threads) {
  const int64_t count = call.indices.count, n = call.n;
  return visit_indices("transpose_codes", call.indices.data, call.indices.type, [&](auto* indices) {
    const int64_t bad = first_bad_index(indices, count, n, threads);
    if (bad >= 0) return bad;
    const int64_t most = n == 0 ? 1 : count / (kEntriesPerLatent * n);
    const int team = useful_threads(most < threads ? static_cast<int>(most) : threads,
                                    kNanosecondsPerEntry * static_cast<double>(count));
    if (team > 1) {
      sort_together(indices, count, n, call.offsets, call.positions, team);
    } else {
      sort_alone(indices, count, n, call.offsets, call.positions);
    }
    return bad;
  });
}

bool is_transposition(const IsTranspositionArguments& call, int threads) {
  const int64_t count = call.indices.count, n = call.n;
  const int64_t* offsets = call.offsets;
  if (n > INT32_MAX || count > INT32_MAX) return false;
  if (offsets[0] != 0 || offsets[n] != count) return false;
  const int team =
      useful_threads(threads, kNanosecondsPerEntry / 2 * static_cast<double>(count + n));
  const Buffer<int32_t> padded(count + 2);
  int32_t* latents = padded.get() + 1;
  latents[-1] = -1;
  latents[count] = INT32_MAX;
  int64_t first_wrong = team;
  visit_indices("is_transposition", call.indices.data, call.indices.type, [&](auto* indices) {
    in_parallel(team, [&](int t) {
      const Share share = share_of(count, t, team);
      if (!list_latents(indices, count, n, call.positions, share, latents)) lower(&first_wrong, t);
    });
  });
  // Each latent's list begins after the last entry of smaller latents.
  in_parallel(team, [&](int t) {
    const Share share = share_of(n, t, team);
    bool right = true;
    for (int64_t i = share.begin; i < share.end; ++i) {
      const uint64_t begin = static_cast<uint64_t>(offsets[i]);
      const bool inside = begin <= static_cast<uint64_t>(count);
      const int32_t* at = latents + (inside ? begin : 0);
      right &= inside & (at[-1] < i) & (at[0] >= i);
    }
    if (!right) lower(&first_wrong, t);
  });
  return first_wrong == team;
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
