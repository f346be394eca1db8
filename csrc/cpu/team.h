// One parallel region for many stages: the threads of torch's pool meet at light barriers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>

#include "vec.h"

// All members arrive before any leaves. Waiting is spinning, since a stage ends within
// microseconds for all; after a while the time slice is given up, in case a core is shared.
class Barrier {
 public:
  void set_members(int members) { members_ = members; }

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 2000)
        _mm_pause();
      else
        std::this_thread::yield();
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  int members_ = 1;
};

// A member's place in its team, and its share of n things: consecutive ones, the same at each call.
struct Member {
  int index, members;
  Barrier* barrier;

  int64_t first(int64_t n) const { return n * index / members; }
  int64_t last(int64_t n) const { return n * (index + 1) / members; }
  void wait() const {
    if (members > 1) barrier->wait();
  }
};

// body(Member) on every thread of a team. parallel_for may hand a thread several of the indices
// (inside another parallel region all of them): then the first of them is the member, and how many
// members there are is known once every index has been taken.
template <class Body>
inline void with_team(int threads, Body&& body) {
  if (threads == 1) return body(Member{0, 1, nullptr});
  Barrier barrier;
  std::atomic<int> taken{0}, members{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int index = members.fetch_add(1);
    taken.fetch_add(static_cast<int>(end - begin), std::memory_order_acq_rel);
    while (taken.load(std::memory_order_acquire) < threads) _mm_pause();
    const int count = members.load();
    if (index == 0) barrier.set_members(count);
    // The barrier is ready before anyone can meet there: index 0 says so by taking one more.
    if (index == 0) taken.fetch_add(1, std::memory_order_acq_rel);
    while (taken.load(std::memory_order_acquire) == threads) _mm_pause();
    body(Member{index, count, &barrier});
  });
}
