// One parallel region for many stages: a team of torch's threads that meet at light barriers. The
// words are OpenMP's.
#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>

#include "shared/ranges.h"

// All threads arrive before any leaves. Waiting is spinning, since a stage ends within microseconds
// for all. After a while a thread gives up its time slice, in case a core is shared.
class Barrier {
 public:
  void set_num_threads(int num_threads) { num_threads_ = num_threads; }

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
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
  int num_threads_ = 1;
};

struct TeamThread {
  int thread_num, num_threads;
  Barrier* barrier;

  // The thread's share of n things: the same at each call.
  Range share(int64_t n) const { return ::share(n, thread_num, num_threads); }
  void wait() const {
    if (num_threads > 1) barrier->wait();
  }
};

// body(TeamThread) on every thread of a team. parallel_for may hand a thread several of the indices
// (inside another parallel region all of them): then it joins the team once. How many threads there
// are is known once every index has been taken.
template <class Body>
inline void with_thread_team(int indices, Body&& body) {
  if (indices == 1) return body(TeamThread{0, 1, nullptr});
  Barrier barrier;
  std::atomic<int> taken{0}, joined{0};
  torch::stable::parallel_for(0, indices, 1, [&](int64_t begin, int64_t end) {
    const int thread_num = joined.fetch_add(1);
    taken.fetch_add(static_cast<int>(end - begin), std::memory_order_acq_rel);
    while (taken.load(std::memory_order_acquire) < indices) _mm_pause();
    const int num_threads = joined.load();
    if (thread_num == 0) barrier.set_num_threads(num_threads);
    // The barrier is ready before anyone can meet there: thread 0 says so by taking one more.
    if (thread_num == 0) taken.fetch_add(1, std::memory_order_acq_rel);
    while (taken.load(std::memory_order_acquire) == indices) _mm_pause();
    body(TeamThread{thread_num, num_threads, &barrier});
  });
}
