// One parallel region for many stages: a team of torch's threads that go through the same stages.
//
// A stage has so many things to do, in chunks, and is over when all are done, whoever did them.
// Each thread of the team has a share, from which it takes first, then it takes what others have
// left. So a thread that has lost its processor delays the others by the chunk that it holds, and
// by nothing if it holds none: it finds those stages over that it has missed. A thread that waits
// gives its time slice up soon.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <vector>

#include "shared/ranges.h"

// Counts what is done of all stages so far, and lets threads wait for it.
class Progress {
 public:
  bool reached(uint32_t total) const {
    return static_cast<int32_t>(done_.load(std::memory_order_acquire) - total) >= 0;
  }

  // `total` is what will have been done at the stage's end.
  void add(uint32_t things, uint32_t total) {
    if (done_.fetch_add(things) + things == total && sleepers_.load() > 0)
      syscall(SYS_futex, &done_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // meanwhile() is called at each turn.
  template <class Meanwhile>
  bool spin(uint32_t total, int pauses, Meanwhile&& meanwhile) const {
    for (; pauses > 0 && !reached(total); --pauses) meanwhile();
    return pauses > 0;
  }

  void sleep(uint32_t total) {
    sleepers_.fetch_add(1);
    for (uint32_t seen; seen = done_.load(), !reached(total);)
      syscall(SYS_futex, &done_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
  }

 private:
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
};

// How much of one thread's share has been taken, and of which stage: one word, so that a thread
// that comes late takes nothing of a stage that is over.
class alignas(64) Taken {
 public:
  // The next chunk's first thing within a share of `size`, or -1.
  int64_t take(uint32_t stage, int64_t size, int64_t chunk) {
    uint64_t now = word_.load(std::memory_order_relaxed);
    for (;;) {
      if (now >> 32 > stage) return -1;
      const int64_t first = now >> 32 == stage ? static_cast<int64_t>(now & 0xffffffff) : 0;
      if (first >= size) return -1;
      const uint64_t next = uint64_t{stage} << 32 | static_cast<uint64_t>(first + chunk);
      if (word_.compare_exchange_weak(now, next, std::memory_order_relaxed)) return first;
    }
  }

 private:
  std::atomic<uint64_t> word_{0};
};

struct Team {
  explicit Team(int shares) : taken(shares) {}
  int shares() const { return static_cast<int>(taken.size()); }

  Progress progress;
  std::vector<Taken> taken;  // of each share
};

// One thread's way through the stages.
class TeamThread {
 public:
  TeamThread(Team& team, int number) : team_(team), number_(number) {}

  // This thread's share of n things: what it takes first.
  Range share_of(int64_t n) const { return ::share(n, number_, team_.shares()); }

  // The next stage: prepare() once, if there is anything to do, then work(first, last) for chunks
  // of n things, of which no two threads have the same; and the end of the stage. ahead() is called
  // once before this thread may have to wait, and at each turn that it does.
  template <class Prepare, class Work, class Ahead>
  void stage(int64_t n, int64_t chunk, Prepare&& prepare, Work&& work, Ahead&& ahead) {
    ++stage_;
    total_ += static_cast<uint32_t>(n);
    int64_t did = 0;
    bool prepared = false;
    const auto take_from = [&](int number) {
      const Range share = ::share(n, number, team_.shares());
      for (int64_t first; (first = team_.taken[number].take(stage_, share.size(), chunk)) >= 0;) {
        if (!prepared) prepare();
        prepared = true;
        const Range part{share.first + first, std::min(share.first + first + chunk, share.last)};
        work(part.first, part.last);
        did += part.size();
      }
    };
    const auto report = [&] {
      if (did > 0) team_.progress.add(static_cast<uint32_t>(did), total_);
      did = 0;
    };
    take_from(number_);
    if (team_.shares() == 1) return ahead();
    // On a machine that is free all end together: then nobody looks through the others' shares.
    report();
    ahead();
    if (team_.progress.spin(total_, kBriefly, ahead)) return;
    for (int i = 1; i < team_.shares(); ++i) take_from((number_ + i) % team_.shares());
    report();
    if (!team_.progress.spin(total_, kLonger, ahead)) team_.progress.sleep(total_);
  }
  template <class Prepare, class Work>
  void stage(int64_t n, int64_t chunk, Prepare&& prepare, Work&& work) {
    stage(n, chunk, prepare, work, [] { _mm_pause(); });
  }

 private:
  // Pauses, each of 15 to 50 ns: less than a chunk, and about what being woken takes.
  static constexpr int kBriefly = 32, kLonger = 1000;

  Team& team_;
  const int number_;
  uint32_t stage_ = 0, total_ = 0;
};

// body(thread, its number) on every thread of a team with so many shares. parallel_for may have
// fewer threads than that (inside another parallel region one): they do all of the shares.
template <class Body>
inline void with_thread_team(int shares, Body&& body) {
  Team team(shares);
  const auto run = [&](int64_t begin, int64_t) {
    const int number = static_cast<int>(begin);
    body(TeamThread(team, number), number);
  };
  if (shares == 1) return run(0, 1);
  torch::stable::parallel_for(0, shares, 1, run);
}
