// The stand-alone checker: runs the CUDA kernels under sanitizers, without Python.
#pragma once

#include <string>

namespace sparsekern::emulation {

// Whether the run shall be short: fewer and smaller cases (ThreadSanitizer is ten times slower).
extern bool quick;

// The emulation itself: barriers, warp functions, atomics, misuse that must be noticed.
int check_emulation(int* cases);

// Commits a mistake that a sanitizer must report: "race" (a barrier is missing), "race-shuffle"
// (only a shuffle is there instead), "overrun" (of dynamic shared memory) or "overrun-global".
// Returns false for any other name.
bool plant(const std::string& mistake);

}  // namespace sparsekern::emulation

// Each returns the number of failures, tells them on stdout and counts its cases.
int check_topk(int* cases);
int check_products(int* cases);
int check_adam(int* cases);
int check_threshold(int* cases);
int check_pointwise_conv(int* cases);
