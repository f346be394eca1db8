// Vectors of bfloat16 lanes in pairs: the pair in each 32-bit lane meets one lane of a Vec.
#pragma once

#include "cpu/simd/vec.h"

#if defined(__AVX512F__)

struct Bf16Pairs {
  __m512i v;
  static constexpr int64_t size = 32;  // bfloat16 lanes
};

inline Bf16Pairs load_pairs(const void* p, Full) { return {_mm512_loadu_si512(p)}; }
inline Bf16Pairs load_pairs(const void* p, Tail t) {
  return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << t.count) - 1), p)};
}
inline void store_pairs(void* p, Bf16Pairs a) { _mm512_storeu_si512(p, a.v); }
inline void store_pairs(void* p, Bf16Pairs a, Tail t) {
  _mm512_mask_storeu_epi16(p, static_cast<__mmask32>((1ull << t.count) - 1), a.v);
}
inline Vec as_vec(Bf16Pairs a) { return {_mm512_castsi512_ps(a.v)}; }
inline Vec even_lanes(Bf16Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Vec odd_lanes(Bf16Pairs a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff0000)))};
}

#else

struct Bf16Pairs {
  __m256i v;
  static constexpr int64_t size = 16;
};

inline Bf16Pairs load_pairs(const void* p, Full) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
inline Bf16Pairs load_pairs(const void* p, Tail t) {
  uint16_t part[Bf16Pairs::size] = {};
  std::memcpy(part, p, t.count * 2);
  return load_pairs(part, Full{});
}
inline void store_pairs(void* p, Bf16Pairs a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), a.v);
}
inline void store_pairs(void* p, Bf16Pairs a, Tail t) {
  uint16_t part[Bf16Pairs::size];
  store_pairs(part, a);
  std::memcpy(p, part, t.count * 2);
}
inline Vec even_lanes(Bf16Pairs a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
inline Vec odd_lanes(Bf16Pairs a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(0xffff0000)))};
}

#endif

// acc + the products of the pairs with floats at x: those of the even lanes, then of the odd ones.
inline Vec dot(Bf16Pairs a, const float* x, Vec acc) {
  acc = fma(even_lanes(a), load(x, Full{}), acc);
  return fma(odd_lanes(a), load(x + Vec::size, Full{}), acc);
}

#if defined(__AVX512BF16__)
// With pairs, in one instruction.
inline Vec dot(Bf16Pairs a, Bf16Pairs b, Vec acc) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline Vec dot(Bf16Pairs a, const bf16* x, Vec acc) { return dot(a, load_pairs(x, Full{}), acc); }
#endif
