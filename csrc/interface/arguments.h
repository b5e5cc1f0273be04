// The arguments of each kernel, as interface/kernels.def lists them.
#pragma once

#include "interface/operands.h"

namespace sparsekern {

#define SPARSEKERN_FIELD(type, name) type name;
#define SPARSEKERN_KERNEL(name, Arguments, Result, ...) \
  struct Arguments {                                    \
    __VA_ARGS__                                         \
  };
#include "interface/kernels.def"

}  // namespace sparsekern
