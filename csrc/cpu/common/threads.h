// How kernels use threads: the one place that decides how many a piece of work deserves, starts
// them, and brings back what they throw. Compiled once, for every instruction set; kernels call it
// by way of parallel.h.
#pragma once

#include <cstdint>

namespace sparsekern::cpu {

// How many threads, at most `threads`, work deserves that takes one of them so many nanoseconds.
int useful_threads(int threads, double nanoseconds);

// Calls run(body, member) once for each member 0..team-1 of a team, on a thread each where there
// are as many. Members never wait for one another, so they may also run one after the other: in a
// process that was forked from one with threads, whose threads did not come along. A member's
// thread treats denormals as the caller's does. Rethrows the first exception of a member; others
// may then not have run.
using Member = void (*)(const void* body, int member);
void run_team(int team, Member run, const void* body);

// Teams of more than one thread that were started so far.
int64_t started_teams();

// Sets how much work pays for a thread, and returns what did before: tests have teams do little.
double set_nanoseconds_per_thread(double nanoseconds);

// While it lives, its thread computes with denormals, whatever mode it is in: which elements are
// the largest does not depend on a thread's mode.
class KeepDenormals {
 public:
  KeepDenormals();
  ~KeepDenormals();
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
  uint64_t before_;
};

}  // namespace sparsekern::cpu
