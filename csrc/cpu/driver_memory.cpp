// The part of the stand-alone checker for kept_memory.h.
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "driver.h"
#include "kept_memory.h"

namespace sparsekern::cpu {

namespace {

int surprises = 0;

void expect(bool right, const char* what) {
  if (right) return;
  ++surprises;
  std::printf("MISMATCH kept_memory: %s\n", what);
}

// Writes all bytes and reads them back: AddressSanitizer watches the borders, and a block that two
// owners had would not keep its own pattern.
bool keeps(const KeptBlock& block, unsigned char pattern) {
  std::memset(block.data(), pattern, block.bytes());
  const auto* bytes = static_cast<const unsigned char*>(block.data());
  return bytes[0] == pattern && bytes[block.bytes() - 1] == pattern;
}

void check_turns() {
  constexpr size_t kSize = 100'001;
  release_kept();
  expect(kept_bytes() == 0, "nothing is kept after a release");
  auto first = std::make_unique<KeptBlock>(kSize);
  const void* const place = first->data();
  expect(keeps(*first, 1), "a fresh block");
  first.reset();
  expect(kept_bytes() == kSize, "a freed block is kept");
  const KeptBlock again(kSize);
  expect(again.data() == place && kept_bytes() == 0, "the same size gets it back");
  const KeptBlock other(kSize);
  expect(other.data() != place, "a block that is in use is not given out");
  expect(keeps(again, 2) && keeps(other, 3), "two blocks");
  {
    const KeptBlock freed(kSize + 1);
  }
  expect(kept_bytes() == kSize + 1, "another size is kept, too");
  const KeptBlock larger(2 * kSize);
  expect(kept_bytes() == 0 && keeps(larger, 4), "a size that is not there drops the rest");
}

void check_limit() {
  constexpr size_t kSize = kKeptBytes / 2 - 1;  // never touched, so it costs addresses only
  release_kept();
  std::vector<std::unique_ptr<KeptBlock>> blocks;
  for (int i = 0; i < 3; ++i) blocks.push_back(std::make_unique<KeptBlock>(kSize));
  blocks.clear();
  expect(kept_bytes() == 2 * kSize, "no more than the limit is kept");
  release_kept();
}

void check_threads() {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int id = 0; id < 4; ++id) {
    threads.emplace_back([id, &wrong] {
      for (int turn = 0; turn < 200; ++turn) {
        const KeptBlock block(64 + 64 * static_cast<size_t>((id + turn) % 3));
        wrong[static_cast<size_t>(id)] += !keeps(block, static_cast<unsigned char>(id));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (int count : wrong) expect(count == 0, "each thread has blocks of its own");
  release_kept();
}

}  // namespace

int check_kept_memory(int* cases) {
  surprises = 0;
  check_turns();
  check_limit();
  check_threads();
  *cases += 3;
  return surprises;
}

}  // namespace sparsekern::cpu
