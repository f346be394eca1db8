// Memory that kernels use for themselves.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// `count` floats that nobody has written yet, from a cache line on.
inline std::unique_ptr<float[], Free> floats(int64_t count) {
  const size_t bytes = static_cast<size_t>((count + 15) / 16 * 64);
  return std::unique_ptr<float[], Free>(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

// Hands out the floats of one allocation, one part after the other.
struct Parts {
  float* next;

  float* take(int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  }
  // As many 32-bit lanes of a matrix product's operand.
  template <class Lane>
  Lane* take_as(int64_t count) {
    static_assert(sizeof(Lane) == sizeof(float));
    return reinterpret_cast<Lane*>(take(count));
  }
};
