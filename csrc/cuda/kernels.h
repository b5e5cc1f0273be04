// The kernels on the GPU. What they do stands in interface/kernels.def. Addresses are those of
// device memory, nothing synchronises, and there is no float64. A workspace is as large as the
// kernel's function `..._workspace` says, in bytes, aligned to 16; its contents may be anything.
#pragma once

#include <cuda_runtime.h>

#include "interface/arguments.h"

namespace sparsekern::cuda {

#define SPARSEKERN_KERNEL(name, Arguments, Result, ...) \
  void name(const Arguments& call, cudaStream_t stream);
#define SPARSEKERN_KERNEL_WITH_WORKSPACE(name, Arguments, Result, ...) \
  int64_t name##_workspace(const Arguments& call);                     \
  void name(const Arguments& call, void* workspace, cudaStream_t stream);
#define SPARSEKERN_CPU_KERNEL(...)
#include "interface/kernels.def"

}  // namespace sparsekern::cuda
