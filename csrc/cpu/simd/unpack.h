// The codes of compressed weights as vectors: 8 and 4 bits, and the segments of packed12.
#pragma once

#include <algorithm>

#include "cpu/simd/bf16_pairs.h"

#if defined(__AVX512F__)

// 128 + q in bfloat16 for nibble `Phase` of each 16-bit lane: q is the end of the mantissa of 128.
template <int Phase>
inline Bf16Pairs nibble_plus_128(Bf16Pairs a) {
  const __m512i q = Phase == 0 ? a.v : _mm512_srli_epi16(a.v, 4 * Phase);
  if constexpr (Phase == 3) return {_mm512_or_si512(q, _mm512_set1_epi16(0x4300))};
  // (q & 15) | 0x4300
  return {_mm512_ternarylogic_epi32(q, _mm512_set1_epi16(15), _mm512_set1_epi16(0x4300), 0xea)};
}
inline Vec load_bytes_less_128(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i s = _mm_xor_si128(b, _mm_set1_epi8(static_cast<char>(0x80)));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(s))};
}
inline Vec load_nibbles(const uint8_t* p) {
  int64_t codes;
  std::memcpy(&codes, p, 8);
  // Each half of them to eight lanes.
  const __m512i spread = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_set1_epi64(codes));
  const __m512i shifts =
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i q = _mm512_and_si512(_mm512_srlv_epi32(spread, shifts), _mm512_set1_epi32(15));
  return {_mm512_cvtepi32_ps(q)};
}
#if defined(__AVX512BF16__)
// 32 Count elements, deinterleaved to Count runs of 32: run r has the columns Count l + r.
template <int Count>
inline void deinterleave(const bf16* x, bf16* out) {
  for (int64_t i = 0; i < Count; ++i) {
    const __m512i fours = _mm512_loadu_si512(x + 32 * i);
    for (int run = 0; run < Count; ++run) {
      const __m512i moved = _mm512_srl_epi64(fours, _mm_cvtsi32_si128(16 * run));
      if constexpr (Count == 4)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 32 * run + 8 * i),
                         _mm512_cvtepi64_epi16(moved));
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * run + 16 * i),
                            _mm512_cvtepi32_epi16(moved));
    }
  }
}
#endif
inline Vec permuted(Vec a, const int32_t* lanes) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), a.v)};
}

// A table of 16 exponents, as the two bytes of a bfloat16 that hold them.
struct Exponents {
  __m512i high, low;
  explicit Exponents(const uint8_t* table) {
    const __m128i e = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m128i half = _mm_and_si128(_mm_srli_epi16(e, 1), _mm_set1_epi8(0x7f));
    const __m128i bit = _mm_and_si128(_mm_slli_epi16(e, 7), _mm_set1_epi8(static_cast<char>(0x80)));
    high = _mm512_broadcast_i32x4(half);
    low = _mm512_broadcast_i32x4(bit);
  }
};
// The 128 weights of a packed12 segment, in order. Those of escapes are to be replaced.
inline void unpack_segment(const uint8_t* p, const Exponents& table, Bf16Pairs (&out)[4]) {
  const __m512i pairs = _mm512_loadu_si512(p + 128), nibble = _mm512_set1_epi8(15);
  const __m512i codes[2] = {_mm512_and_si512(pairs, nibble),
                            _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble)};
  for (int i = 0; i < 2; ++i) {
    const __m512i bytes = _mm512_loadu_si512(p + 64 * i), mask = _mm512_set1_epi8(0x7f);
    // sign from the byte, exponent bits from the table; exponent's last bit, mantissa.
    const __m512i high =
        _mm512_ternarylogic_epi32(bytes, mask, _mm512_shuffle_epi8(table.high, codes[i]), 0xba);
    const __m512i low =
        _mm512_ternarylogic_epi32(bytes, mask, _mm512_shuffle_epi8(table.low, codes[i]), 0xea);
    out[2 * i] = {_mm512_unpacklo_epi8(low, high)};
    out[2 * i + 1] = {_mm512_unpackhi_epi8(low, high)};
  }
}

#else

template <int Phase>
inline Bf16Pairs nibble_plus_128(Bf16Pairs a) {
  const __m256i q = Phase == 0 ? a.v : _mm256_srli_epi16(a.v, 4 * Phase);
  return {_mm256_or_si256(_mm256_and_si256(q, _mm256_set1_epi16(15)), _mm256_set1_epi16(0x4300))};
}
inline Vec load_bytes_less_128(const uint8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i s = _mm_xor_si128(b, _mm_set1_epi8(static_cast<char>(0x80)));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(s))};
}
inline Vec load_nibbles(const uint8_t* p) {
  int32_t codes;
  std::memcpy(&codes, p, 4);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i q = _mm256_srlv_epi32(_mm256_set1_epi32(codes), shifts);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(q, _mm256_set1_epi32(15)))};
}
inline Vec permuted(Vec a, const int32_t* lanes) {
  return {
      _mm256_permutevar8x32_ps(a.v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)))};
}

struct Exponents {
  __m256i high, low;
  explicit Exponents(const uint8_t* table) {
    const __m128i e = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m128i half = _mm_and_si128(_mm_srli_epi16(e, 1), _mm_set1_epi8(0x7f));
    const __m128i bit = _mm_and_si128(_mm_slli_epi16(e, 7), _mm_set1_epi8(static_cast<char>(0x80)));
    high = _mm256_broadcastsi128_si256(half);
    low = _mm256_broadcastsi128_si256(bit);
  }
};
inline void unpack_segment(const uint8_t* p, const Exponents& table, Bf16Pairs (&out)[8]) {
  const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i mantissa = _mm256_set1_epi8(0x7f);
  for (int i = 0; i < 4; ++i) {  // 32 bytes: halves of the columns 0..31 and 32..63 of 64
    const __m256i pairs = load_pairs(p + 128 + 32 * (i % 2), Full{}).v;
    const __m256i codes = _mm256_and_si256(i < 2 ? pairs : _mm256_srli_epi16(pairs, 4), nibble);
    const __m256i bytes = load_pairs(p + 32 * i, Full{}).v;
    const __m256i high =
        _mm256_or_si256(_mm256_and_si256(bytes, sign), _mm256_shuffle_epi8(table.high, codes));
    const __m256i low =
        _mm256_or_si256(_mm256_and_si256(bytes, mantissa), _mm256_shuffle_epi8(table.low, codes));
    const int at = 4 * (i / 2) + i % 2;
    out[at] = {_mm256_unpacklo_epi8(low, high)};
    out[at + 2] = {_mm256_unpackhi_epi8(low, high)};
  }
}

#endif

// Lane indices that give each 32-bit lane the scale of its columns' group, `run` lanes having a
// group: lanes[first] begins with group `first`.
struct Spread {
  alignas(64) int32_t lanes[Vec::size][Vec::size];
  constexpr explicit Spread(int64_t run) : lanes() {
    for (int64_t first = 0; first < Vec::size; ++first)
      for (int64_t i = 0; i < Vec::size; ++i)
        lanes[first][i] = static_cast<int32_t>(std::min(Vec::size - 1, first + i / run));
  }
};
// Made once: of groups of 32, 64 and 128 columns of 4 or 8 bits.
inline constexpr Spread kSpreads[4] = {Spread(4), Spread(8), Spread(16), Spread(32)};
inline const Spread& spread_of(int64_t run) {
  return kSpreads[run <= 4 ? 0 : run <= 8 ? 1 : run <= 16 ? 2 : 3];
}

// Activations that a vector of pairs meets, once in registers for several rows of a weight.
struct FloatPairs {
  Vec even, odd;
};
inline FloatPairs load_met(const float* x) {
  return {load(x, Full{}), load(x + Vec::size, Full{})};
}
// dot() for the nibbles of one phase. With floats there is 136 less in each lane: 128 + q becomes
// q - 8, which is centred.
inline Vec dot_nibbles(Bf16Pairs a, FloatPairs x, Vec acc) {
  acc = fma(even_lanes(a) - vec(136.0f), x.even, acc);
  return fma(odd_lanes(a) - vec(136.0f), x.odd, acc);
}
#if defined(__AVX512BF16__)
inline Bf16Pairs load_met(const bf16* x) { return load_pairs(x, Full{}); }
inline Vec dot_nibbles(Bf16Pairs a, Bf16Pairs x, Vec acc) { return dot(a, x, acc); }
#endif
