// What the parts of the stand-alone checker share. See driver.cpp.
#pragma once

#include <map>
#include <string>

#include "cpu/dispatch.h"

namespace sparsekern::cpu {

// Cases so far, by kernel.
using Cases = std::map<std::string, int>;

// One part of the checker, which registers itself where it is defined:
//
//   const Checks kChecks(check_topk);
//
// `check` runs kernels of one instruction set against their definition, counts its cases by the
// name of the kernel, tells of mismatches, and returns how many there were.
class Checks {
 public:
  using Check = int (*)(const Kernels& kernels, Cases* cases);
  explicit Checks(Check check);
};

// Has teams do things, and throw; returns the number of surprises and adds to *cases.
int check_threads(int* cases);

}  // namespace sparsekern::cpu
