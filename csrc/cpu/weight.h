// A weight matrix [n, k] in any of its forms (elmkernels/formats.py), and the arrangement of an
// activation row that each form's product wants.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "words.h"

// As elmkernels/ops/linear.py numbers them.
enum class Form : int64_t { Float, BFloat16, Half, Affine8, Affine4, Packed };
enum class Element : int64_t { Float, BFloat16, Half };

struct Weight {
  Form form;
  int64_t n, k;
  int64_t row_bytes;
  const uint8_t* data;
  Element element;  // of scales and biases
  const uint8_t *scales, *biases;
  int64_t group;
  const uint8_t* exponents;
  const int32_t *escape_starts, *escape_columns;
  const uint16_t* escape_values;

  const uint8_t* row(int64_t r) const { return data + r * row_bytes; }
  int64_t groups() const { return k / group; }
  bool affine() const { return form == Form::Affine8 || form == Form::Affine4; }
};

constexpr int64_t kSegmentColumns = 128, kSegmentBytes = 192;

// fn(T{}) for the element type of scales and biases.
template <class Fn>
inline void with_element(Element element, Fn&& fn) {
  switch (element) {
    case Element::Float: return fn(float{});
    case Element::BFloat16: return fn(bf16{});
    case Element::Half: return fn(fp16{});
  }
}

// What the pairs of a Words meet in a product with activations of type T.
#if defined(__AVX512BF16__)
template <class T>
using Lanes = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
#else
template <class T>
using Lanes = float;
#endif

// A row of activations is padded with zeros to a multiple of this many columns.
constexpr int64_t kPadding = 128;
inline int64_t padded(int64_t k) { return (k + kPadding - 1) / kPadding * kPadding; }

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widened(fp16 x) { return _cvtsh_ss(x.bits); }

// One row of activations, arranged for one form. `values` holds padded(k) floats, or as many
// bfloat16 in the same place; `sums` the sum of each group of an affine form.
struct Activation {
  float* values;
  float* sums;
};

// Room for the activations of a batch, whatever the form. Rows begin on cache lines: a vector that
// crosses one takes two loads, and these products load a vector for every one they compute.
class Activations {
 public:
  Activations(int64_t batch, int64_t k, int64_t groups) {
    const int64_t row = padded(k) + (groups + 15) / 16 * 16;
    floats_.reset(
        static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(1, batch) * row * 4)));
    for (int64_t b = 0; b < batch; ++b)
      rows.push_back({floats_.get() + b * row, floats_.get() + b * row + padded(k)});
  }
  Activations(int64_t batch, const Weight& w)
      : Activations(batch, w.k, w.affine() ? w.groups() : 0) {}

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> floats_;

 public:
  std::vector<Activation> rows;
};

// A Words of pairs meets bfloat16 lanes in their own order, but floats of its even lanes first,
// then of its odd ones. Nibble `phase` of lane l is column 4 l + phase.
template <class T, class P>
inline void place_pairs(const T* x, int64_t k, P* out) {
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
template <class T, class P>
inline void place_nibbles(const T* x, int64_t k, P* out) {
  constexpr int64_t lanes = Words::size, block = 4 * lanes;
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
      deal_by_four(from, out + c);
    } else {
      for (int64_t phase = 0; phase < 4; ++phase)
        for (int64_t i = 0; i < Vec::size; ++i) {
          out[c + phase * lanes + i] = widened(from[8 * i + phase]);
          out[c + phase * lanes + Vec::size + i] = widened(from[8 * i + 4 + phase]);
        }
    }
  }
}

template <class T>
inline void arrange(const Weight& w, const T* x, Activation& to) {
  Lanes<T>* lanes = reinterpret_cast<Lanes<T>*>(to.values);
  switch (w.form) {
    case Form::Affine8:
      if constexpr (std::is_same_v<Lanes<T>, bf16>) {
        place_pairs(x, w.k, lanes);
        break;
      }
      [[fallthrough]];
    case Form::Float:
    case Form::Half:
      std::memset(to.values, 0, padded(w.k) * sizeof(float));
      sweep(w.k, [&](int64_t i, auto part) { store(to.values + i, load(x + i, part), part); });
      break;
    case Form::Affine4: place_nibbles(x, w.k, lanes); break;
    case Form::BFloat16:
    case Form::Packed: place_pairs(x, w.k, lanes); break;
  }
  if (!w.affine()) return;
  for (int64_t g = 0; g < w.groups(); ++g) {
    Vec total = vec(0.0f);
    for (int64_t c = 0; c < w.group; c += Vec::size)
      total = total + load(x + g * w.group + c, Full{});
    to.sums[g] = sum(total);
  }
}
