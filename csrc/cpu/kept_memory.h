// Memory of large outputs, kept when they are freed for the next output of the same size.
//
// A training step makes the same large outputs every time: gradients of the weights, masked
// activations. An allocator returns blocks of their size to the system, which gives them anew,
// page by page and cleared, in the next step. Compiled once, for every instruction set.
#pragma once

#include <cstddef>

namespace sparsekern::cpu {

// Freed blocks are kept up to so many bytes together.
constexpr size_t kKeptBytes = size_t{2} << 30;

// Memory of its own for an output, aligned to a huge page; taken in the constructor, given back in
// the destructor. Blocks may be made and destroyed on any thread. Throws std::bad_alloc.
class KeptBlock {
 public:
  explicit KeptBlock(size_t bytes);
  ~KeptBlock();
  KeptBlock(const KeptBlock&) = delete;
  KeptBlock& operator=(const KeptBlock&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_;
};

// Bytes of freed blocks that are kept now.
size_t kept_bytes();

// Gives all freed blocks back to the system.
void release_kept();

}  // namespace sparsekern::cpu
