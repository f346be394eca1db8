// Exponentials and sigmoids: exact to an ulp or two for float, cheaper for values that are rounded
// to a half type next. The last argument says which.
#pragma once

#include "cpu/simd/vec.h"

// exp(a) to 1-2 ulp for a in [-80, 80], the range it is clamped to: 2^n e^r with |r| <= ln(2)/2,
// e^r by its Taylor polynomial of degree 6 in Horner form (error under 2^-24 relative).
inline Vec exp_clamped(Vec a) {
  const Vec x = clamp(a, -80.0f, 80.0f);
  const Vec n = nearest(x * vec(1.44269504f));
  const Vec r = fnma(n, vec(-2.12194440e-4f), fnma(n, vec(0.693359375f), x));
  Vec p = vec(1.0f / 720);
  p = fma(p, r, vec(1.0f / 120));
  p = fma(p, r, vec(1.0f / 24));
  p = fma(p, r, vec(1.0f / 6));
  p = fma(p, r, vec(0.5f));
  p = fma(p, r, vec(1.0f));
  p = fma(p, r, vec(1.0f));
  return times_power_of_two(p, n);
}

// sigmoid(a) = 1 / (1 + e) with e = exp(-a); 1 - sigmoid(a) = e sigmoid(a), without cancellation.
inline Vec exp_of_minus(Vec a, float) { return exp_clamped(vec(0.0f) - a); }
inline Vec sigmoid_from(Vec e, float) { return reciprocal(vec(1.0f) + e); }

// For values that are rounded to 11 bits or fewer next: 2^n 2^f with |f| <= 1/2, 2^f by a minimax
// polynomial (3e-6 relative), and a 14-bit reciprocal. That is a third fewer instructions, which
// pays if the row is in a cache.
inline Vec exp2_fast(Vec t) {
  const Vec n = nearest(t);
  const Vec f = t - n;
  Vec p = vec(9.57010221e-3f);
  p = fma(p, f, vec(5.59178628e-2f));
  p = fma(p, f, vec(2.40247443e-1f));
  p = fma(p, f, vec(6.93121791e-1f));
  p = fma(p, f, vec(9.99999285e-1f));
  return times_power_of_two(p, n);
}
template <class Half>
inline Vec exp_of_minus(Vec a, Half) {
  return exp2_fast(clamp(a * vec(-1.44269504f), -126.0f, 126.0f));
}
template <class Half>
inline Vec sigmoid_from(Vec e, Half) {
  return reciprocal_fast(vec(1.0f) + e);
}
template <class T>
inline Vec sigmoid(Vec a, T type) {
  return sigmoid_from(exp_of_minus(a, type), type);
}

// Beyond kTail exp is clamped, and a large a would magnify what it clamps: a sigmoid of 0 and a
// complement of 0 are exact there, but for the last numbers that float holds.
constexpr float kTail = 80.0f;

// a exp(b) for b < -kTail: 0 from -2 kTail on, as in float; NaN of infinity times 0.
inline Vec times_exp(Vec a, Vec b) {
  const Vec root = where_below(b, -2 * kTail, vec(0.0f), exp_clamped(b * vec(0.5f)));
  return a * root * root;
}

// silu(a) = a sigmoid(a).
template <class T>
inline Vec silu(Vec a, T type) {
  const Vec found = a * sigmoid(a, type);
  if (!any_below(a, -kTail)) return found;
  return where_below(a, -kTail, times_exp(a, a), found);
}

// silu(a), and its slope s (1 + a (1 - s)) with s = sigmoid(a). A large a magnifies what 1 - s
// loses if it is subtracted.
struct SiluAndSlope {
  Vec silu, slope;
};
template <class T>
inline SiluAndSlope silu_and_slope(Vec a, T type) {
  const Vec minus = vec(0.0f) - a;
  const Vec e = where_below(minus, -kTail, vec(0.0f), exp_of_minus(a, type));
  const Vec s = sigmoid_from(e, type);
  SiluAndSlope found{a * s, s * fma(a, e * s, vec(1.0f))};
  if (!any_below(a, -kTail)) return found;
  found.silu = where_below(a, -kTail, times_exp(a, a), found.silu);
  found.slope = where_below(a, -kTail, times_exp(vec(1.0f) + a, a), found.slope);
  return found;
}

// 2^a for a up to 127, exactly 0 for a <= -160: by the polynomials above, to 2e-9 for float.
inline Vec exp2_of(Vec a, float) {
  const Vec t = clamp(a, kPowerOfZero, 127.0f);
  const Vec n = nearest(t);
  const Vec f = t - n;
  Vec p = vec(1.534580358e-4f);
  p = fma(p, f, vec(1.339993115e-3f));
  p = fma(p, f, vec(9.618488988e-3f));
  p = fma(p, f, vec(5.550328777e-2f));
  p = fma(p, f, vec(2.402264689e-1f));
  p = fma(p, f, vec(6.931472057e-1f));
  p = fma(p, f, vec(1.0f));
  return times_power_of_two(p, n);
}
template <class Half>
inline Vec exp2_of(Vec a, Half) {
  return exp2_fast(clamp(a, kPowerOfZero, 127.0f));
}
