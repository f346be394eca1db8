// A warp, as schedules, kernels and the host's stand-in for a GPU know it.
#pragma once

constexpr int kLanes = 32;

// What a lane has of N sums.
template <int N>
struct Floats {
  float v[N];
};
