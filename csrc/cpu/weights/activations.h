// Rows of activations for the product with a weight, and the room that they take.
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

// One row of activations. `values` holds padded(k) floats, or as many bfloat16 or blocks of int8 in
// the same place; `sums` holds the sum of each group of an affine form.
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
