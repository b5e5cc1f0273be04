// driver [--quick] [--self-test] [--plant race|race-shuffle|overrun|overrun-global]
#include "tests/emulation/driver.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace sparsekern::emulation {

bool quick = false;

namespace {

struct Part {
  const char* name;
  int (*check)(int* cases);
};

std::vector<Part>& parts() {
  static std::vector<Part> registered;
  return registered;
}

int usage() {
  std::printf(
      "usage: driver [--quick] [--self-test] [--plant race|race-shuffle|overrun|overrun-global]\n");
  return 2;
}

// Runs one list of cases and says how many there were; returns the failures.
int report(const char* name, int (*check)(int*)) {
  const auto start = std::chrono::steady_clock::now();
  int cases = 0, failures = 0;
  try {
    failures = check(&cases);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
    failures = 1;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s: %d cases, %d failures, %.1f s\n", name, cases, failures, seconds.count());
  std::fflush(stdout);
  return failures;
}

int main_with(int count, char** arguments) {
  bool only_self_test = false;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--quick") {
      quick = true;
    } else if (argument == "--self-test") {
      only_self_test = true;
    } else if (argument == "--plant" && i + 1 < count) {
      return plant(arguments[i + 1]) ? 0 : usage();
    } else {
      return usage();
    }
  }
  int failures = 0;
  for (const Part& part : parts()) {
    if (only_self_test && std::strcmp(part.name, "emulation") != 0) continue;
    failures += report(part.name, part.check);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace

Checks::Checks(const char* name, int (*check)(int*)) { parts().push_back({name, check}); }

}  // namespace sparsekern::emulation

int main(int count, char** arguments) { return sparsekern::emulation::main_with(count, arguments); }
