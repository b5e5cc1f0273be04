// The kernels of one instruction set, which SPARSEKERN_ISA names (baseline, avx2, avx512). Included
// once for each, hence no include guard. What they do stands in interface/kernels.def.
#include "interface/arguments.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

#define SPARSEKERN_KERNEL(name, Arguments, Result, ...) \
  Result name(const Arguments& call, int threads);
#define SPARSEKERN_CUDA_KERNEL(...)
#include "interface/kernels.def"

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
