// The kernels that screen latents, against their definitions.
#include "tests/cpu/driver.h"
#include "tests/screening.h"

namespace sparsekern::cpu {

namespace {

int check_screening(const Kernels& kernels, Cases* cases) {
  int calls = 0;
  const auto threads = [&calls] { return 1 + ++calls % 3; };
  return screening::check(
      {[&](const RoundRowsArguments& call) { kernels.round_rows(call, threads()); },
       [&](const ScreenScoresArguments& call) { kernels.screen_scores(call, threads()); }},
      false, &(*cases)["round_rows"], &(*cases)["screen_scores"]);
}

const Checks kChecks(check_screening);

}  // namespace

}  // namespace sparsekern::cpu
