// How n things are rounded up and shared out.
#pragma once

#include <cstdint>

#include "shared/host_device.h"

HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Range {
  int64_t first, last;
  HOST_DEVICE constexpr int64_t size() const { return last - first; }
};

// The consecutive things of n that belong to number `index` of `count` workers.
HOST_DEVICE constexpr Range share(int64_t n, int64_t index, int64_t count) {
  return {n * index / count, n * (index + 1) / count};
}
