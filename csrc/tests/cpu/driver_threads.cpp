// The part of the stand-alone checker for threads.h.
#include <atomic>
#include <cstdio>
#include <new>
#include <stdexcept>

#include "cpu/common/threads.h"
#include "tests/cpu/driver.h"

namespace sparsekern::cpu {

namespace {

int surprises = 0;

void expect(bool right, const char* what) {
  if (right) return;
  ++surprises;
  std::printf("MISMATCH threads: %s\n", what);
}

template <class Body>
void in_team(int team, const Body& body) {
  const auto run = [](const void* state, int member) {
    (*static_cast<const Body*>(state))(member);
  };
  run_team(team, run, &body);
}

void check_members() {
  for (int team : {1, 2, 5}) {
    const int64_t before = started_teams();
    std::atomic<int> members{0};
    in_team(team, [&](int member) { members += 1 << member; });
    expect(members == (1 << team) - 1, "each member is called once");
    expect(started_teams() - before == (team > 1 ? 1 : 0), "one member is no team");
  }
}

void check_exceptions() {
  for (int team : {1, 2, 5}) {
    bool caught = false;
    try {
      in_team(team, [&](int member) {
        if (member == team - 1) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught, "what a member throws reaches the caller");
    try {
      in_team(team, [](int) { throw std::runtime_error("all"); });
    } catch (const std::runtime_error&) {
      continue;
    }
    expect(false, "what all members throw reaches the caller");
  }
}

void check_useful() {
  const double before = set_nanoseconds_per_thread(100);
  expect(useful_threads(8, 199) == 1, "no second thread for less than two shares");
  expect(useful_threads(8, 200) == 2 && useful_threads(8, 1e12) == 8, "a thread a share");
  expect(useful_threads(0, 1e12) == 1 && useful_threads(-1, 1e12) == 1, "at least one thread");
  set_nanoseconds_per_thread(before);
}

}  // namespace

int check_threads(int* cases) {
  surprises = 0;
  check_members();
  check_exceptions();
  check_useful();
  *cases += 3;
  return surprises;
}

}  // namespace sparsekern::cpu
