// Atomic functions. Relaxed, as on the hardware: they order no other memory.
#pragma once

#include <atomic>

namespace sparsekern::emulation {

template <class T>
T atomic_add(T* p, T value) {
  return std::atomic_ref<T>(*p).fetch_add(value, std::memory_order_relaxed);
}

// Replaces *p by value where better(value, *p).
template <class T, class Better>
T atomic_replace(T* p, T value, Better better) {
  std::atomic_ref<T> target(*p);
  T old = target.load(std::memory_order_relaxed);
  while (better(value, old) &&
         !target.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

template <class T>
T atomic_max(T* p, T value) {
  return atomic_replace(p, value, [](T a, T b) { return a > b; });
}

template <class T>
T atomic_min(T* p, T value) {
  return atomic_replace(p, value, [](T a, T b) { return a < b; });
}

}  // namespace sparsekern::emulation

using sparsekern_wide = unsigned long long;

inline int atomicAdd(int* p, int v) { return sparsekern::emulation::atomic_add(p, v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  return sparsekern::emulation::atomic_add(p, v);
}
inline sparsekern_wide atomicAdd(sparsekern_wide* p, sparsekern_wide v) {
  return sparsekern::emulation::atomic_add(p, v);
}
inline int atomicMax(int* p, int v) { return sparsekern::emulation::atomic_max(p, v); }
inline unsigned atomicMax(unsigned* p, unsigned v) {
  return sparsekern::emulation::atomic_max(p, v);
}
inline int atomicMin(int* p, int v) { return sparsekern::emulation::atomic_min(p, v); }
inline unsigned atomicMin(unsigned* p, unsigned v) {
  return sparsekern::emulation::atomic_min(p, v);
}
