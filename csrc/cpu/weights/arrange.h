// Rows of activations, arranged for the product with a weight in one of its forms.
#pragma once

#include "cpu/weights/int8.h"

// For bfloat16 weights. Bf16Pairs meet bfloat16 in their own order, but floats of the even lanes
// first, then those of the odd ones.
template <class T, class P>
inline void arrange_pairs(const T* x, int64_t k, P* out) {
  constexpr int64_t half = Vec::size;
  std::fill(out + k / (2 * half) * 2 * half, out + padded(k), P{});
  if constexpr (std::is_same_v<P, T> && !std::is_same_v<P, float>) {
    std::memcpy(out, x, k * sizeof(P));
  } else {
    int64_t c = 0;
    for (; c + 2 * half <= k; c += 2 * half)
      for (int64_t i = 0; i < half; ++i) {
        out[c + i] = widened(x[c + 2 * i]);
        out[c + half + i] = widened(x[c + 2 * i + 1]);
      }
    for (int64_t i = 0; c + i < k; ++i) out[c + i / 2 + i % 2 * half] = widened(x[c + i]);
  }
}
// For codes. The 4 nibbles of 16-bit lane l are those of the columns 4 l, 4 l + 1, ..., its 2 bytes
// those of 2 l, 2 l + 1: each of the `Runs` phases of a load of codes meets a run of lanes.
template <int Runs, class T, class P>
inline void arrange_deinterleaved(const T* x, int64_t k, P* out) {
  constexpr int64_t lanes = Bf16Pairs::size, block = Runs * lanes;
  std::memset(out, 0, padded(k) * sizeof(P));
  for (int64_t c = 0; c < k; c += block) {
    T part[block] = {};  // a whole block, whatever is left of the row
    const int64_t count = std::min(block, k - c);
    const T* from = x + c;
    if (count < block) {
      std::memcpy(part, from, count * sizeof(T));
      from = part;
    }
    if constexpr (std::is_same_v<P, T> && !std::is_same_v<P, float>) {
      deinterleave<Runs>(from, out + c);
    } else {
      for (int64_t run = 0; run < Runs; ++run)
        for (int64_t i = 0; i < Vec::size; ++i) {
          out[c + run * lanes + i] = widened(from[2 * Runs * i + run]);
          out[c + run * lanes + Vec::size + i] = widened(from[2 * Runs * i + Runs + run]);
        }
    }
  }
}

// A row of k activations as the form of w takes it.
template <class T>
inline void arrange(const Weight& w, const T* x, Activation& to) {
  if (w.form == Form::Affine8Int8) return arrange_int8<8>(w, x, to);
  if (w.form == Form::Affine4Int8) return arrange_int8<4>(w, x, to);
  auto* values = reinterpret_cast<Arranged<T>*>(to.values);
  switch (w.form) {
    case Form::Affine8:
      if constexpr (std::is_same_v<Arranged<T>, bf16>) {
        arrange_deinterleaved<2>(x, w.k, values);
        break;
      }
      [[fallthrough]];
    case Form::Float:
    case Form::Half:
      std::memset(to.values, 0, padded(w.k) * sizeof(float));
      sweep(w.k, [&](int64_t i, auto part) { store(to.values + i, load(x + i, part), part); });
      break;
    case Form::Affine4: arrange_deinterleaved<4>(x, w.k, values); break;
    case Form::BFloat16:
    case Form::Packed12: arrange_pairs(x, w.k, values); break;
    default: break;
  }
  if (!w.affine()) return;
  for (int64_t g = 0; g < w.groups(); ++g) {
    Vec total = vec(0.0f);
    for (int64_t c = 0; c < w.group; c += Vec::size)
      total = total + load(x + g * w.group + c, Full{});
    to.sums[g] = sum(total);
  }
}
