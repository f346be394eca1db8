// Products of bytes: unsigned codes with signed activations, four at a time in each 32-bit lane.
#pragma once

#include "cpu/simd/vec.h"

#if defined(__AVX512F__)

struct Bytes {
  __m512i v;
  static constexpr int64_t size = 64;
};

inline Bytes load_bytes(const void* p, Full) { return {_mm512_loadu_si512(p)}; }
inline Bytes load_bytes(const void* p, Tail t) {
  return {_mm512_maskz_loadu_epi8((1ull << t.count) - 1, p)};
}
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
inline Vec to_floats(Bytes lanes) { return {_mm512_cvtepi32_ps(lanes.v)}; }
// The nearest integers in [-128, 127], of ties the even ones.
inline void store_int8(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
// Of magnitudes as integers, which order inf and NaN behind all numbers.
inline Vec larger_magnitude(Vec a, Vec b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  return {_mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a.v), magnitude),
                       _mm512_and_si512(_mm512_castps_si512(b.v), magnitude)))};
}
inline float largest_magnitude(Vec a) {
  const int bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a.v));
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#if defined(__AVX512VNNI__)
// acc + the four products of each lane.
template <int Bits>
inline Bytes dot_bytes(Bytes codes, Bytes x, Bytes acc) {
  return {_mm512_dpbusd_epi32(acc.v, codes.v, x.v)};
}
#else
// Pairs are added with 16 bits, which hold those of codes below 16: bytes are two nibbles.
template <int Bits>
inline Bytes dot_bytes(Bytes codes, Bytes x, Bytes acc) {
  const auto of = [&](Bytes nibbles, int16_t by) -> __m512i {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(nibbles.v, x.v), _mm512_set1_epi16(by));
  };
  if constexpr (Bits == 4) return {_mm512_add_epi32(acc.v, of(codes, 1))};
  return {_mm512_add_epi32(acc.v, _mm512_add_epi32(of(low_nibbles(codes), 1),
                                                   of(high_nibbles(codes), 16)))};
}
#endif

#else

struct Bytes {
  __m256i v;
  static constexpr int64_t size = 32;
};

inline Bytes load_bytes(const void* p, Full) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
inline Bytes load_bytes(const void* p, Tail t) {
  uint8_t part[Bytes::size] = {};
  std::memcpy(part, p, t.count);
  return load_bytes(part, Full{});
}
inline Bytes low_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm256_srli_epi16(a.v, 4)}); }
inline Vec to_floats(Bytes lanes) { return {_mm256_cvtepi32_ps(lanes.v)}; }
inline void store_int8(int8_t* p, Vec a) {
  const __m256i wide = _mm256_cvtps_epi32(a.v);
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
inline Vec larger_magnitude(Vec a, Vec b) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_castsi256_ps(
      _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a.v), magnitude),
                       _mm256_and_si256(_mm256_castps_si256(b.v), magnitude)))};
}
inline float largest_magnitude(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(m));
}
template <int Bits>
inline Bytes dot_bytes(Bytes codes, Bytes x, Bytes acc) {
  const auto of = [&](Bytes nibbles, int16_t by) -> __m256i {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(nibbles.v, x.v), _mm256_set1_epi16(by));
  };
  if constexpr (Bits == 4) return {_mm256_add_epi32(acc.v, of(codes, 1))};
  return {_mm256_add_epi32(acc.v, _mm256_add_epi32(of(low_nibbles(codes), 1),
                                                   of(high_nibbles(codes), 16)))};
}

#endif

// The sum of the four bytes of each 32-bit lane.
inline __m128i sums_of_four(__m128i bytes) {
  return _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), bytes), _mm_set1_epi16(1));
}
