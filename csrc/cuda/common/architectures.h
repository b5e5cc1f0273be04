// Which GPUs the kernels were compiled for.
#pragma once

#include <string>

namespace sparsekern::cuda {

// Such as "sm_80, sm_90"; "none" under the emulation.
std::string architectures();

// The compiler of the kernels.
std::string compiler();

}  // namespace sparsekern::cuda
