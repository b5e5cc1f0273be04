// Codes as dense rows: zeros, then the values in their places.
#include "cpu/common/clear.h"
#include "cpu/common/dtypes.h"
#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Bound by writing the dense rows once; the values hit lines that are still in the caches.
void codes_to_dense(const CodesToDenseArguments& call, int threads) {
  const auto* indices = static_cast<const int64_t*>(call.codes.indices);
  const int64_t rows = call.codes.rows, k = call.codes.k, n = call.n;
  visit_dtype("codes_to_dense", call.codes.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const auto* values = static_cast<const Stored*>(call.codes.values);
    const int64_t row_bytes = n * static_cast<int64_t>(sizeof(Stored));
    advise_huge_pages(call.dense, static_cast<size_t>(rows * row_bytes));
    const bool past_caches = rows * row_bytes >= kLargerThanCaches;
    const double bytes = static_cast<double>(rows) * static_cast<double>(row_bytes);
    const int team = useful_threads(threads, kNanosecondsPerClearedByte * bytes);
    share_out(team, rows, [&](int64_t b) {
      Stored* row = static_cast<Stored*>(call.dense) + b * n;
      clear(row, row_bytes, past_caches);
      for (int64_t j = b * k; j < (b + 1) * k; ++j) row[indices[j]] = values[j];
    });
  });
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
