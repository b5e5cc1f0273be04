// Scratch memory, aligned to cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd/lanes.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr int64_t kMost = INT64_MAX / static_cast<int64_t>(sizeof(T)) - kCacheLineBytes;
    if (count < 0 || count > kMost) throw std::bad_alloc();
    const size_t line = static_cast<size_t>(kCacheLineBytes);
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + line) / line * line;
    data_ = static_cast<T*>(std::aligned_alloc(line, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
