// Operands of small matrix products, as 32-bit lanes: a float, or two bfloat16 that are neighbours
// along the summed dimension if the processor multiplies such pairs at once. AMX takes lanes of
// that dimension by the tile, so that operands end in zeros there.
#pragma once

#include <algorithm>

#include "cpu/simd/amx.h"
#include "cpu/simd/bf16_pairs.h"
#include "shared/ranges.h"

// A matrix by its first element and the distance between its rows.
template <class X>
struct Matrix {
  X* data;
  int64_t stride;

  X* row(int64_t i) const { return data + i * stride; }
  Matrix from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

template <class T>
struct Operand {
  using Lane = float;
  static constexpr int64_t per = 1;     // elements of T in a lane
  static constexpr int64_t whole = 1;   // lanes that the sum takes at once
  static constexpr bool tiled = false;  // whether by AMX
};

template <class T>
using Lane = typename Operand<T>::Lane;

inline Vec splat(float a) { return vec(a); }
inline Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }

// A vector of lanes, as its bits: `part` of a row along the summed dimension ...
template <class T, class Part>
inline Vec load_lanes(const T* p, Part part) {
  return load(p, part);
}
// ... or `part` of `per` rows across it, each lane having an element of every row.
template <class T, class Part>
inline Vec stacked(const T* low, const T*, Part part) {
  return load(low, part);
}

#if defined(__AVX512BF16__)

struct Bf16Pair {
  uint32_t bits;  // the earlier one low
};

template <>
struct Operand<bf16> {
  using Lane = Bf16Pair;
  static constexpr int64_t per = 2;
#if defined(ELMKERNELS_AMX)
  static constexpr int64_t whole = kAmxLanes;
  static constexpr bool tiled = true;
#else
  static constexpr int64_t whole = 1;
  static constexpr bool tiled = false;
#endif
};

inline Bf16Pairs load(const Bf16Pair* p, Full) { return load_pairs(p, Full{}); }
inline Bf16Pairs splat(Bf16Pair a) { return {_mm512_set1_epi32(static_cast<int>(a.bits))}; }
inline Vec load_lanes(const bf16* p, Full) { return as_vec(load_pairs(p, Full{})); }
inline Vec load_lanes(const bf16* p, Tail t) { return as_vec(load_pairs(p, t)); }

inline Vec stacked(__m256i low, __m256i high) {
  const __m512i a = _mm512_cvtepu16_epi32(low), b = _mm512_cvtepu16_epi32(high);
  return {_mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)))};
}
inline __m256i bits_of(const bf16* p, Full) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m256i bits_of(const bf16* p, Tail t) { return _mm256_maskz_loadu_epi16(mask_of(t), p); }
template <class Part>
inline Vec stacked(const bf16* low, const bf16* high, Part part) {
  return stacked(bits_of(low, part), high ? bits_of(high, part) : _mm256_setzero_si256());
}
inline Vec stacked(Vec low, Vec high) { return stacked(narrow(low, bf16{}), narrow(high, bf16{})); }

#else

inline Vec stacked(Vec low, Vec) { return low; }

#endif

// The lanes of so many elements along the sum, with those that are zeros.
template <class T>
constexpr int64_t lanes_of(int64_t elements) {
  return round_up((elements + Operand<T>::per - 1) / Operand<T>::per, Operand<T>::whole);
}
// Elements across a sum that may be along the next one: in whole vectors, and lanes.
template <class T>
constexpr int64_t filled(int64_t elements) {
  return round_up(elements, std::max<int64_t>(Vec::size, Operand<T>::per * Operand<T>::whole));
}

// A vector of lanes of a row of `width` elements, from element `at` on; zeros behind its end.
template <class T>
inline Vec row_lanes(const T* row, int64_t at, int64_t width) {
  constexpr int64_t step = Vec::size * Operand<T>::per;
  const int64_t left = width - at;
  if (left >= step) return load_lanes(row + at, Full{});
  return left > 0 ? load_lanes(row + at, Tail{left}) : vec(0.0f);
}

// Gathering: rows that lie apart become one operand in scratch. row(i) points to `width` elements.
// Called, not inlined, and once a block: their many copies were a fifth of attention's compilation.

// As rows: out [rows, out_row].
template <class T, class Row>
[[gnu::noinline, gnu::noclone]] void gather_rows(Row row, int64_t rows, int64_t width, Lane<T>* out,
                                                 int64_t out_row) {
  float* bits = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t w = 0; w < out_row; w += Vec::size)
      store(bits + i * out_row + w, row_lanes<T>(row(i), w * Operand<T>::per, width), Full{});
}

// As columns: out [lanes of width, out_row], with zeros up to `filled` rows.
template <class T, class Row>
[[gnu::noinline, gnu::noclone]] void gather_columns(Row row, int64_t rows, int64_t width,
                                                    Lane<T>* out, int64_t out_row) {
  float* bits = reinterpret_cast<float*>(out);
  const int64_t depth = lanes_of<T>(width);
  for (int64_t r = 0; r < filled<T>(rows); r += Vec::size)
    for (int64_t w = 0; w < depth; w += Vec::size) {
      Vec block[Vec::size];
      for (int64_t i = 0; i < Vec::size; ++i)
        block[i] = r + i < rows ? row_lanes<T>(row(r + i), w * Operand<T>::per, width) : vec(0.0f);
      transpose(block);
      const int64_t count = std::min<int64_t>(Vec::size, depth - w);
      for (int64_t i = 0; i < count; ++i) store(bits + (w + i) * out_row + r, block[i], Full{});
    }
}

// As rows stacked along the summed dimension: out [lanes of rows, out_row] in whole vectors.
template <class T, class Row>
[[gnu::noinline, gnu::noclone]] void gather_stacked(Row row, int64_t rows, int64_t width,
                                                    Lane<T>* out, int64_t out_row) {
  constexpr int64_t per = Operand<T>::per;
  for (int64_t i = 0; i < rows; i += per) {
    const T* low = row(i);
    const T* high = per == 2 && i + 1 < rows ? row(i + 1) : nullptr;
    float* bits = reinterpret_cast<float*>(out) + i / per * out_row;
    sweep(width, [&](int64_t d, auto part) {
      store(bits + d, stacked(low + d, high == nullptr ? nullptr : high + d, part), Full{});
    });
  }
  if constexpr (Operand<T>::tiled)
    for (int64_t i = (rows + per - 1) / per; i < lanes_of<T>(rows); ++i)
      std::fill_n(reinterpret_cast<float*>(out) + i * out_row, round_up(width, Vec::size), 0.0f);
}
