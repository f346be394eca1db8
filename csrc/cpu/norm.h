// One row through RMSNorm, forward and backward.
#pragma once

#include <cmath>

#include "cpu/simd/vec.h"

inline float rstd_of(float sum_of_squares, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(n) + eps);
}

template <class T>
inline float row_rstd(const T* x, int64_t n, float eps) {
  float sums[1];
  sweep_sums(n, sums, [&](int64_t i, auto part, Vec* acc) {
    const Vec a = load(x + i, part);
    acc[0] = fma(a, a, acc[0]);
  });
  return rstd_of(sums[0], n, eps);
}

// y = round(x * rstd) * weight. With a float weight the product is rounded once, at the store.
template <class T, class W>
inline void norm_row(const T* x, const W* weight, T* y, int64_t n, float rstd) {
  const Vec scale = vec(rstd);
  sweep(n, [&](int64_t i, auto part) {
    const Vec z = round_to<T>(load(x + i, part) * scale);
    store(y + i, z * load(weight + i, part), part);
  });
}

// dx = [dsum +] rstd (dz - z mean(dz z)), dweight += dy round(z); dz = dy weight, z = x rstd.
template <class T, class W>
inline void norm_row_backward(const T* dy, const T* dsum, const T* x, const W* weight, T* dx,
                              float* dweight, int64_t n, float eps) {
  float sums[2];
  sweep_sums(n, sums, [&](int64_t i, auto part, Vec* acc) {
    const Vec a = load(x + i, part);
    acc[0] = fma(a, a, acc[0]);
    acc[1] = fma(load(dy + i, part) * load(weight + i, part), a, acc[1]);
  });
  const float rstd = rstd_of(sums[0], n, eps);
  const Vec scale = vec(rstd);
  const Vec mean = vec(sums[1] * rstd / static_cast<float>(n));
  sweep(n, [&](int64_t i, auto part) {
    const Vec d = load(dy + i, part);
    const Vec z = load(x + i, part) * scale;
    Vec g = scale * fnma(z, mean, d * load(weight + i, part));
    if (dsum != nullptr) g = g + load(dsum + i, part);
    store(dweight + i, fma(d, round_to<T>(z), load(dweight + i, part)), part);
    store(dx + i, g, part);
  });
}
