// Runs every CPU kernel, on every instruction set of this build that this CPU has, against its
// definition. Needs no Python: python_tests/native/test_sanitizers.py builds it with
// AddressSanitizer and UndefinedBehaviorSanitizer. Prints the cases per kernel; returns 1 after a
// mismatch.
#include "tests/cpu/driver.h"

#include <cstdio>
#include <vector>

#include "cpu/common/threads.h"

namespace sparsekern::cpu {

namespace {

std::vector<Checks::Check>& registered() {
  static std::vector<Checks::Check> checks;
  return checks;
}

}  // namespace

Checks::Checks(Check check) { registered().push_back(check); }

}  // namespace sparsekern::cpu

int main() {
  using namespace sparsekern::cpu;
  set_nanoseconds_per_thread(1);  // teams, although the cases are small
  Cases cases;
  int mismatches = check_threads(&cases["threads"]);
  int sets = 0;
  const Kernels* kernels = runnable_kernels(&sets);
  for (int i = 0; i < sets; ++i) {
    std::printf("instruction set %s\n", kernels[i].instruction_set);
    for (const Checks::Check check : registered()) mismatches += check(kernels[i], &cases);
  }
  for (const auto& [kernel, count] : cases) std::printf("%s: %d cases\n", kernel.c_str(), count);
  std::printf("%d mismatches\n", mismatches);
  return mismatches == 0 ? 0 : 1;
}
