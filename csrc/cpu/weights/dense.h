// The dense row that a row of a compressed weight stands for.
#pragma once

#include "cpu/weights/activations.h"

template <class T, class S>
inline void affine_row(const Weight& w, int64_t r, T* out) {
  const S* scales = reinterpret_cast<const S*>(w.scales) + r * w.groups();
  const S* biases = reinterpret_cast<const S*>(w.biases) + r * w.groups();
  const uint8_t* row = w.row(r);
  for (int64_t g = 0; g < w.groups(); ++g) {
    const Vec scale = vec(widened(scales[g])), bias = vec(widened(biases[g]));
    for (int64_t c = g * w.group; c < (g + 1) * w.group; c += Vec::size) {
      const Vec q = w.form == Form::Affine8 ? load_bytes_less_128(row + c) + vec(128.0f)
                                            : load_nibbles(row + c / 2);
      store(out + c, scale * q + bias, Full{});  // two roundings, as the reference has
    }
  }
}

inline void packed12_row(const Weight& w, int64_t r, uint16_t* out) {
  const Exponents table(w.exponents);
  constexpr int kPairs = kSegmentColumns / Bf16Pairs::size;
  const uint8_t* segment = w.row(r);
  for (int64_t c = 0; c < w.k; c += kSegmentColumns, segment += kSegmentBytes) {
    Bf16Pairs pairs[kPairs];
    unpack_segment(segment, table, pairs);
    for (int i = 0; i < kPairs; ++i) {
      const int64_t at = c + i * Bf16Pairs::size, left = w.k - at;
      if (left >= Bf16Pairs::size)
        store_pairs(out + at, pairs[i]);
      else if (left > 0)
        store_pairs(out + at, pairs[i], Tail{left});
    }
  }
  for (int32_t e = w.escape_starts[r]; e < w.escape_starts[r + 1]; ++e)
    out[w.escape_columns[e]] = w.escape_values[e];
}

// Row r of any weight as T, which is bfloat16 for packed12.
template <class T>
inline void dense_row(const Weight& w, int64_t r, T* out) {
  switch (w.form) {
    case Form::Packed12: return packed12_row(w, r, reinterpret_cast<uint16_t*>(out));
    case Form::Affine8:
    case Form::Affine4:
      return with_element(w.element, [&](auto s) { affine_row<T, decltype(s)>(w, r, out); });
    default: std::memcpy(out, w.row(r), w.k * sizeof(T));
  }
}
