// One head through RMSNorm and RoPE, forward.
#pragma once

#include <type_traits>

#include "cpu/norm.h"

// y = rotate(norm(x)) for one head; `weight` is null if q and k aren't normalized. A head whose
// halves are whole vectors (a constant `half`) stays in registers from its load to its store.
template <class T, class W, class Half>
inline void head_forward(const T* x, const W* weight, const float* rotation, T* y, Half half,
                         float eps) {
  if constexpr (!std::is_integral_v<Half>) {
    constexpr int kVectors = 2 * Half::value / Vec::size;
    Vec h[kVectors], squares[2] = {vec(0.0f), vec(0.0f)};
    for (int i = 0; i < kVectors; ++i) {
      h[i] = load(x + i * Vec::size, Full{});
      squares[i % 2] = fma(h[i], h[i], squares[i % 2]);
    }
    if (weight != nullptr) {
      const Vec scale = vec(rstd_of(sum(squares[0] + squares[1]), 2 * half, eps));
      for (int i = 0; i < kVectors; ++i)
        h[i] = round_to<W>(round_to<T>(h[i] * scale) * load(weight + i * Vec::size, Full{}));
    }
    for (int i = 0; i < kVectors / 2; ++i) {
      const int64_t at = i * Vec::size;
      const Vec cos = load(rotation + at, Full{}), sin = load(rotation + half + at, Full{});
      const Vec a = h[i], b = h[i + kVectors / 2];
      store(y + at, fnma(b, sin, a * cos), Full{});
      store(y + half + at, fma(a, sin, b * cos), Full{});
    }
  } else {
    const Vec scale = vec(weight == nullptr ? 1.0f : row_rstd(x, 2 * half, eps));
    const auto unit = [&](int64_t i, auto part) {
      const Vec a = load(x + i, part);
      return weight == nullptr ? a : round_to<W>(round_to<T>(a * scale) * load(weight + i, part));
    };
    sweep(half, [&](int64_t i, auto part) {
      const Vec cos = load(rotation + i, part), sin = load(rotation + half + i, part);
      const Vec a = unit(i, part), b = unit(half + i, part);
      store(y + i, fnma(b, sin, a * cos), part);
      store(y + half + i, fma(a, sin, b * cos), part);
    });
  }
}

// fn(half); half is a compile-time constant for head_dim 64 and 128.
template <class Fn>
inline void with_half(int64_t head_dim, Fn&& fn) {
  switch (head_dim) {
    case 64: return fn(std::integral_constant<int64_t, 32>{});
    case 128: return fn(std::integral_constant<int64_t, 64>{});
    default: return fn(head_dim / 2);
  }
}
