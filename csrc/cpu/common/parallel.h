// Work divided among the members of a team (see threads.h).
#pragma once

#include <cstdint>

#include "cpu/common/threads.h"

namespace sparsekern::cpu::SPARSEKERN_ISA {

// Calls body(member) for members 0..team-1. What they share they write under rules of their own.
template <class Body>
inline void in_parallel(int team, const Body& body) {
  const auto run = [](const void* state, int member) {
    (*static_cast<const Body*>(state))(member);
  };
  run_team(team, run, &body);
}

// A member's share of `total` elements.
struct Share {
  int64_t begin, end;
};
inline Share share_of(int64_t total, int member, int team) {
  const auto cut = [&](int64_t t) {
    return static_cast<int64_t>(static_cast<__int128>(total) * t / team);
  };
  return {cut(member), cut(member + 1)};
}

// Calls body(i) for i in 0..count-1, a share of neighbours to each member.
template <class Body>
inline void share_out(int team, int64_t count, const Body& body) {
  in_parallel(team, [&](int member) {
    const Share share = share_of(count, member, team);
    for (int64_t i = share.begin; i < share.end; ++i) body(i);
  });
}

// Hands out 0..count-1 to whoever is free, `chunk` neighbours at a time.
class Queue {
 public:
  Queue(int64_t count, int64_t chunk) : count_(count), chunk_(chunk) {}

  // The next ones; none when all are taken.
  Share next() {
    const int64_t begin = __atomic_fetch_add(&next_, chunk_, __ATOMIC_RELAXED);
    if (begin >= count_) return {count_, count_};
    return {begin, count_ - begin < chunk_ ? count_ : begin + chunk_};
  }

 private:
  int64_t count_, chunk_, next_ = 0;
};

// Calls body(i, member) for i in 0..count-1, `chunk` neighbours at a time to whoever is free.
template <class Body>
inline void deal_out(int team, int64_t count, int64_t chunk, const Body& body) {
  Queue queue(count, chunk);
  in_parallel(team, [&](int member) {
    for (Share share = queue.next(); share.begin < share.end; share = queue.next()) {
      for (int64_t i = share.begin; i < share.end; ++i) body(i, member);
    }
  });
}

// *shared = the smaller of it and x, whoever else does the same.
inline void lower(int64_t* shared, int64_t x) {
  int64_t seen = __atomic_load_n(shared, __ATOMIC_RELAXED);
  while (x < seen &&
         !__atomic_compare_exchange_n(shared, &seen, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace sparsekern::cpu::SPARSEKERN_ISA
