#include "cuda/common/architectures.h"

namespace sparsekern::cuda {

#ifdef __CUDA_ARCH_LIST__

std::string architectures() {
  std::string names;
  // nvcc's list of all that this file is compiled for: 800, 900, ...
  for (const int version : {__CUDA_ARCH_LIST__}) {
    names += (names.empty() ? "sm_" : ", sm_") + std::to_string(version / 10);
  }
  return names;
}

std::string compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." +
         std::to_string(__CUDACC_VER_MINOR__) + "." + std::to_string(__CUDACC_VER_BUILD__) +
         ", host " + __VERSION__;
}

#else

std::string architectures() { return "none"; }

std::string compiler() { return __VERSION__; }

#endif

}  // namespace sparsekern::cuda
