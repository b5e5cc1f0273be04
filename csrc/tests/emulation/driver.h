// The stand-alone checker: runs the CUDA kernels under sanitizers, without Python.
#pragma once

#include <string>

namespace sparsekern::emulation {

// Whether the run shall be short: fewer and smaller cases (ThreadSanitizer is ten times slower).
extern bool quick;

// Commits a mistake that a sanitizer must report: "race" (a barrier is missing), "race-shuffle"
// (only a shuffle is there instead), "overrun" (of dynamic shared memory) or "overrun-global".
// Returns false for any other name.
bool plant(const std::string& mistake);

// One part of the checker, which registers itself where it is defined, under the name of its file:
//
//   const sparsekern::emulation::Checks kChecks("topk", check_topk);   // in driver_topk.cpp
//
// `check` returns the number of failures, tells them on stdout and counts its cases.
class Checks {
 public:
  Checks(const char* name, int (*check)(int* cases));
};

}  // namespace sparsekern::emulation
