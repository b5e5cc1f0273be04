// One way to launch a kernel, with nvcc and under the emulation (SPARSEKERN_EMULATION).
//
//   launch(some_kernel<float>, grid, block, shared_bytes, stream, arguments...);
//
// The arguments are converted to the kernel's parameter types as in a plain call. A kernel finds
// its dynamic shared memory with SPARSEKERN_DYNAMIC_SHARED(Type, name).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef SPARSEKERN_EMULATION
#define SPARSEKERN_DYNAMIC_SHARED(Type, name) \
  Type* name = static_cast<Type*>(::sparsekern::emulation::dynamic_shared())
#else
// One untyped array for all kernels of a file: two extern arrays of one name must have one type.
#define SPARSEKERN_DYNAMIC_SHARED(Type, name)                                \
  extern __shared__ __align__(16) unsigned char sparsekern_dynamic_shared[]; \
  Type* name = reinterpret_cast<Type*>(sparsekern_dynamic_shared)
#endif

namespace sparsekern::cuda {

// Shared memory that a kernel may have without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <class T>
struct Exactly {
  using type = T;
};

// Throws std::runtime_error when a CUDA call failed. `what` names the call.
inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is thrown here must not show up again in a later call
  throw std::runtime_error(what + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

#ifndef SPARSEKERN_EMULATION
// The kernel's name for messages (a mangled C++ name), "kernel" where the runtime cannot tell it.
inline std::string kernel_name(const void* kernel) {
  const char* name = nullptr;
#if CUDART_VERSION >= 12030
  if (cudaFuncGetName(&name, kernel) != cudaSuccess) name = nullptr;
#endif
  return name == nullptr ? "kernel" : name;
}

inline void launch_addresses(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  // The status of this very launch: the last error could be one that somebody else left behind.
  if (status == cudaSuccess) {
    status = cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
  }
  if (status != cudaSuccess) check(status, kernel_name(kernel));
}
#endif

// A number of blocks as the first size of a grid.
inline unsigned grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("a launch takes fewer than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

// Runs kernel(arguments...) on grid x block threads in the stream; an empty grid does nothing.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, typename Exactly<Parameters>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef SPARSEKERN_EMULATION
  (void)stream;
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
#else
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
  launch_addresses(reinterpret_cast<const void*>(kernel), grid, block, addresses, shared_bytes,
                   stream);
#endif
}

}  // namespace sparsekern::cuda
