// The kernels of the best instruction set that this CPU has, chosen when first asked for.
#pragma once

#include "interface/arguments.h"

namespace sparsekern::cpu {

// One instruction set: its name, and each kernel of interface/kernels.def.
struct Kernels {
  const char* instruction_set;
#define SPARSEKERN_KERNEL(name, Arguments, Result, ...) \
  Result (*name)(const Arguments& call, int threads);
#define SPARSEKERN_CUDA_KERNEL(...)
#include "interface/kernels.def"
};

// All sets that this build has and this CPU can run, best first; ends with baseline.
const Kernels* runnable_kernels(int* count);

// The set in use.
const Kernels& kernels();

// Uses another runnable set from now on (tests and benchmarks); throws when it is not there.
void use_instruction_set(const char* name);

// Whether this CPU has instructions that multiply vectors or tiles of bfloat16.
bool multiplies_bfloat16();

}  // namespace sparsekern::cpu
