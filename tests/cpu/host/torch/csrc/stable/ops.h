// Stands in for torch's header: parallel_for on as many threads as a test grants.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int granted = 1;

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  const int64_t each = (end - begin + granted - 1) / granted;
  std::vector<std::thread> threads;
  for (int64_t at = begin; at < end; at += each)
    threads.emplace_back([=, &body] { body(at, at + each < end ? at + each : end); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
