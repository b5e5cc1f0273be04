#include "cpu/common/memory.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsekern::cpu {

namespace {

// The huge page of x86-64 and of 4 KiB-granule AArch64.
constexpr uintptr_t kHugePageBytes = uintptr_t{2} << 20;
// Below this the advice costs as much as the page faults it saves, and splits the heap's mappings.
constexpr size_t kWorthwhileBytes = size_t{4} << 20;

}  // namespace

void advise_huge_pages(void* start, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kWorthwhileBytes) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (address + kHugePageBytes - 1) & ~(kHugePageBytes - 1);
  const uintptr_t last = (address + bytes) & ~(kHugePageBytes - 1);
  // The result is ignored: a kernel without huge pages refuses, and nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start;
  (void)bytes;
#endif
}

}  // namespace sparsekern::cpu
