// Advice to the operating system about large fresh outputs. Compiled once, for every instruction
// set.
#pragma once

#include <cstddef>

namespace sparsekern::cpu {

// Asks for huge pages behind [start, start + bytes). Best effort: Linux only, large ranges only.
void advise_huge_pages(void* start, size_t bytes);

}  // namespace sparsekern::cpu
