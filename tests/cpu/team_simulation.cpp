// Teams of threads that stall at random moments: SHARES THREADS LATE ROUNDS SEED. LATE: one thread
// begins when the others have done everything. Each thing of each stage must be done once, after
// all of the stage before; what is counted isn't atomic, so that a sanitizer of threads sees any
// race.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/thread_team.h"

namespace {

struct Stage {
  int64_t n, chunk;
  std::vector<int> done;
};

std::vector<Stage> stages(std::mt19937& random) {
  std::vector<Stage> made;
  for (int i = 0; i < 60; ++i) {
    const int64_t n = random() % 4 == 0 ? random() % 3 : random() % 400;
    made.push_back({n, static_cast<int64_t>(1 + random() % 70), std::vector<int>(n)});
  }
  return made;
}

void stall(std::mt19937& random) {
  if (random() % 200 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(random() % 3));
}

bool all_done(const Stage& stage) {
  return std::all_of(stage.done.begin(), stage.done.end(), [](int count) { return count == 1; });
}

bool right(int shares, bool late, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Stage> todo = stages(random);
  std::atomic<bool> finished{false}, in_order{true};
  with_thread_team(shares, [&](TeamThread thread, int number) {
    std::mt19937 own(seed + 1 + number);
    while (late && number == 0 && !finished) std::this_thread::yield();
    const Stage* before = nullptr;
    for (Stage& stage : todo) {
      stall(own);
      const auto prepare = [&] {
        if (before && !all_done(*before)) in_order = false;
      };
      thread.stage(stage.n, stage.chunk, prepare, [&](int64_t first, int64_t last) {
        if (last - first > stage.chunk) in_order = false;
        for (int64_t i = first; i < last; ++i) ++stage.done[i];
        stall(own);
      });
      before = &stage;
    }
    finished = true;
  });
  return in_order && std::all_of(todo.begin(), todo.end(), all_done);
}

}  // namespace

int main(int, char** arguments) {
  const int shares = std::atoi(arguments[1]);
  torch::stable::granted = std::atoi(arguments[2]);
  const bool late = std::atoi(arguments[3]);
  const int rounds = std::atoi(arguments[4]);
  for (int round = 0; round < rounds; ++round)
    if (!right(shares, late, std::atoi(arguments[5]) + 1000 * round)) {
      std::printf("wrong in round %d\n", round);
      return 1;
    }
}
