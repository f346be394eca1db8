// A weight matrix [n, k] in any of its forms (elmkernels/formats.py), and the arrangement of an
// activation row that each form's product wants.
#pragma once

#include <algorithm>
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

// Room for the activations of a batch, whatever the form.
class Activations {
 public:
  Activations(int64_t batch, int64_t k, int64_t groups) : floats_(batch * (padded(k) + groups)) {
    rows.reserve(batch);
    for (int64_t b = 0; b < batch; ++b) {
      float* at = floats_.data() + b * (padded(k) + groups);
      rows.push_back({at, at + padded(k)});
    }
  }
  Activations(int64_t batch, const Weight& w)
      : Activations(batch, w.k, w.affine() ? w.groups() : 0) {}

 private:
  std::vector<float> floats_;

 public:
  std::vector<Activation> rows;
};

// Where column c goes: a Words of pairs meets bfloat16 lanes in their own order, but floats of its
// even lanes first, then of its odd ones; nibble `phase` of lane l is column 4 l + phase.
template <class P>
inline int64_t pair_place(int64_t lane) {
  if constexpr (std::is_same_v<P, bf16>) return lane;
  const int64_t block = lane / Words::size * Words::size, at = lane % Words::size;
  return block + at / 2 + at % 2 * Vec::size;
}
template <class P>
inline int64_t nibble_place(int64_t c) {
  const int64_t block = c / (4 * Words::size) * (4 * Words::size), at = c % (4 * Words::size);
  return pair_place<P>(block + at % 4 * Words::size + at / 4);
}

template <class T, class P, class Place>
inline void place_row(const T* x, int64_t k, P* out, Place&& place) {
  std::memset(out, 0, padded(k) * sizeof(P));
  for (int64_t c = 0; c < k; ++c) {
    if constexpr (std::is_same_v<P, float>)
      out[place(c)] = widened(x[c]);
    else
      out[place(c)] = x[c];
  }
}

template <class T>
inline void arrange(const Weight& w, const T* x, Activation& to) {
  using P = Lanes<T>;
  P* pairs = reinterpret_cast<P*>(to.values);
  switch (w.form) {
    case Form::Affine4: place_row(x, w.k, pairs, nibble_place<P>); break;
    case Form::BFloat16:
    case Form::Packed: place_row(x, w.k, pairs, pair_place<P>); break;
    default: place_row(x, w.k, to.values, [](int64_t c) { return c; });
  }
  if (!w.affine()) return;
  for (int64_t g = 0; g < w.groups(); ++g) {
    Vec total = vec(0.0f);
    for (int64_t c = 0; c < w.group; c += Vec::size)
      total = total + load(x + g * w.group + c, Full{});
    to.sums[g] = sum(total);
  }
}
