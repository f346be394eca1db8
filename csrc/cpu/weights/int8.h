// Rows of activations rounded to 8 bits, arranged for the codes of an affine weight.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/integers.h"
#include "cpu/weights/activations.h"

constexpr int64_t kInt8Group = 32;  // columns that share a scale: INT8_GROUP of the reference

// What one vector of codes meets. A 32-bit lane holds the codes of 32 / Bits columns: of 8 bits in
// order, of 4 bits the even columns low and the odd ones high. With `starts` a lane's sum of codes
// begins at -128 or -8 times its activations: that centres the codes.
template <int Bits>
struct Int8Block {
  static constexpr int64_t columns = 32 / Bits * Vec::size;
  static constexpr float zero = Bits == 8 ? 128.0f : 8.0f;

  int8_t codes[8 / Bits][Bytes::size];
  int32_t starts[Vec::size];
  float scales[Vec::size];
};
static_assert(sizeof(Int8Block<8>) <= Int8Block<8>::columns * sizeof(float));
static_assert(sizeof(Int8Block<4>) <= Int8Block<4>::columns * sizeof(float));

template <int Bits>
inline Int8Block<Bits>* int8_blocks(const Activation& x) {
  return reinterpret_cast<Int8Block<Bits>*>(x.values);
}

// codes = round(x / scale); returns the scale, NaN if one of the columns is no number.
template <class T>
inline float round_group(const T* x, int8_t (&codes)[kInt8Group]) {
  Vec most = vec(0.0f);
  for (int64_t i = 0; i < kInt8Group; i += Vec::size)
    most = larger_magnitude(most, load(x + i, Full{}));
  const float scale = largest_magnitude(most) / 127.0f;
  const float inverse = scale < std::numeric_limits<float>::min() ? 0.0f : 1.0f / scale;
  for (int64_t i = 0; i < kInt8Group; i += Vec::size)
    store_int8(codes + i, load(x + i, Full{}) * vec(inverse));
  return std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

template <int Bits, class T>
inline void arrange_int8(const Weight& w, const T* x, Activation& to) {
  using Block = Int8Block<Bits>;
  constexpr int64_t lanes = kInt8Group * Bits / 32;  // of a group
  Block* blocks = int8_blocks<Bits>(to);
  if (w.k % Block::columns)  // the last one is not whole
    std::memset(static_cast<void*>(&blocks[w.k / Block::columns]), 0, sizeof(Block));
  const __m128i centre = _mm_cvtsi32_si128(Bits == 8 ? 7 : 3);  // a shift: by 128 or 8
  std::fill_n(to.sums, w.groups(), 0.0f);
  for (int64_t c = 0; c < w.k; c += kInt8Group) {
    int8_t codes[kInt8Group];
    const float scale = round_group(x + c, codes);
    Block& block = blocks[c / Block::columns];
    const int64_t lane = c % Block::columns / (32 / Bits);
    __m128i parts[2] = {_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)),
                        _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16))};
    if constexpr (Bits == 4) {
      const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
      const __m128i a = _mm_shuffle_epi8(parts[0], order), b = _mm_shuffle_epi8(parts[1], order);
      parts[0] = _mm_unpacklo_epi64(a, b);
      parts[1] = _mm_unpackhi_epi64(a, b);
    }
    __m128i totals[2] = {sums_of_four(parts[0]), sums_of_four(parts[1])};
    const __m128i both = _mm_add_epi32(totals[0], totals[1]);
    if constexpr (Bits == 4) totals[0] = both;
    for (int i = 0; i < 2; ++i) {
      int8_t* at = block.codes[Bits == 4 ? i : 0] + 4 * lane + (Bits == 4 ? 0 : 16 * i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), parts[i]);
    }
    for (int i = 0; i < lanes / 4; ++i) {
      const __m128i start =
          _mm_sub_epi32(_mm_setzero_si128(), _mm_sll_epi32(totals[i], centre));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(block.starts + lane + 4 * i), start);
      _mm_storeu_ps(block.scales + lane + 4 * i, _mm_set1_ps(scale));
    }
    __m128i total = _mm_add_epi32(both, _mm_shuffle_epi32(both, 0x4e));
    total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1));
    to.sums[c / w.group] += scale * static_cast<float>(_mm_cvtsi128_si32(total));
  }
}
