// Rows of activations, arranged for the product with a weight in one of its forms.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/simd/unpack.h"
#include "shared/ranges.h"
#include "shared/weight_table.h"

// fn(T{}) for the element type of scales and biases.
template <class Fn>
inline void with_element(Element element, Fn&& fn) {
  switch (element) {
    case Element::Float: return fn(float{});
    case Element::BFloat16: return fn(bf16{});
    case Element::Half: return fn(fp16{});
  }
}

// What Bf16Pairs meet in a product with activations of type T.
#if defined(__AVX512BF16__)
template <class T>
using Arranged = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
#else
template <class T>
using Arranged = float;
#endif

// A row of activations is padded with zeros to a multiple of this many columns.
constexpr int64_t kPadding = 128;
inline int64_t padded(int64_t k) { return round_up(k, kPadding); }

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widened(fp16 x) { return _cvtsh_ss(x.bits); }

// One row of activations. `values` holds padded(k) floats, or as many bfloat16 in the same place;
// `sums` holds the sum of each group of an affine form.
struct Activation {
  float* values;
  float* sums;
};

// Room for the activations of a batch, whatever the form. Rows begin on cache lines: a vector that
// crosses one takes two loads, and these products load a vector for every one they compute. They
// are never a multiple of 4 KB apart: a cache has room for eight lines of the same place in a page.
class Activations {
 public:
  Activations(int64_t batch, int64_t k, int64_t groups) {
    int64_t row = padded(k) + round_up(groups, 16);
    if (row % 1024 == 0) row += 16;
    floats_ = floats(std::max<int64_t>(1, batch) * row);
    for (int64_t b = 0; b < batch; ++b)
      rows.push_back({floats_.get() + b * row, floats_.get() + b * row + padded(k)});
  }
  Activations(int64_t batch, const Weight& w)
      : Activations(batch, w.k, w.affine() ? w.groups() : 0) {}

  std::vector<Activation> rows;

 private:
  std::unique_ptr<float[], Free> floats_;
};

// For bfloat16 weights. Bf16Pairs meet bfloat16 in their own order, but floats of the even lanes
// first, then those of the odd ones.
template <class T, class P>
inline void arrange_pairs(const T* x, int64_t k, P* out) {
  constexpr int64_t half = Vec::size;
  std::memset(out, 0, padded(k) * sizeof(P));
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

template <class T>
inline void arrange(const Weight& w, const T* x, Activation& to) {
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
  }
  if (!w.affine()) return;
  for (int64_t g = 0; g < w.groups(); ++g) {
    Vec total = vec(0.0f);
    for (int64_t c = 0; c < w.group; c += Vec::size)
      total = total + load(x + g * w.group + c, Full{});
    to.sums[g] = sum(total);
  }
}
