#include "kept_memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "memory.h"

namespace sparsekern::cpu {

namespace {

constexpr std::align_val_t kAlignment{size_t{2} << 20};  // a huge page of most systems

struct Freed {
  void* data;
  size_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::vector<Freed> blocks;  // the one freed last stands last
  size_t bytes = 0;
};

// Never destroyed: outputs may outlive the module's static objects.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

void free_all(const std::vector<Freed>& blocks) {
  for (const Freed& block : blocks) ::operator delete(block.data, kAlignment);
}

// The block of that size that was freed last, or null. When there is none the sizes have changed:
// then all kept blocks go.
void* reused(size_t bytes) {
  std::vector<Freed> unfit;
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    auto& blocks = kept().blocks;
    const auto found = std::find_if(blocks.rbegin(), blocks.rend(),
                                    [&](const Freed& block) { return block.bytes == bytes; });
    if (found != blocks.rend()) {
      void* const data = found->data;
      kept().bytes -= bytes;
      blocks.erase(std::next(found).base());
      return data;
    }
    unfit.swap(blocks);
    kept().bytes = 0;
  }
  free_all(unfit);
  return nullptr;
}

}  // namespace

KeptBlock::KeptBlock(size_t bytes) : data_(reused(bytes)), bytes_(bytes) {
  if (data_ != nullptr) return;
  data_ = ::operator new(bytes, kAlignment);
  advise_huge_pages(data_, bytes);
}

KeptBlock::~KeptBlock() {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes + bytes_ <= kKeptBytes) {
      try {
        kept().blocks.push_back({data_, bytes_});
        kept().bytes += bytes_;
        return;
      } catch (const std::bad_alloc&) {
        // No room for the note: the block is freed below.
      }
    }
  }
  ::operator delete(data_, kAlignment);
}

size_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  return kept().bytes;
}

void release_kept() {
  std::vector<Freed> blocks;
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    blocks.swap(kept().blocks);
    kept().bytes = 0;
  }
  free_all(blocks);
}

}  // namespace sparsekern::cpu
