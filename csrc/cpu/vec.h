// The only SIMD file: one vector of floats, loaded from and stored to float, bfloat16 and float16.
// Compiled once per instruction set; the compiler's flags, not code, choose between the two below.
// Half types exist in memory only: arithmetic is float, and round_to<T> is the one way to round.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// How much of a vector a step covers: all of it, or the `count` elements left in a row.
struct Full {};
struct Tail {
  int64_t count;
};

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
  static constexpr int64_t size = 16;
};

inline __mmask16 mask_of(Tail tail) { return static_cast<__mmask16>((1u << tail.count) - 1); }

inline Vec vec(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

inline Vec widen(__m256i bits, bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m256i bits, fp16) { return {_mm512_cvtph_ps(bits)}; }

inline Vec load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, Tail t) { return {_mm512_maskz_loadu_ps(mask_of(t), p)}; }
template <class T>
inline Vec load(const T* p, Full) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline Vec load(const T* p, Tail t) {
  return widen(_mm256_maskz_loadu_epi16(mask_of(t), p), T{});
}

#if defined(__AVX512BF16__)
// One instruction for seven; but it takes denormals for zero, and makes zeros of them.
inline __m256i narrow(Vec a, bf16) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
#else
// Round to nearest even by integer addition. (A NaN stays one unless its payload is all ones.)
inline __m512i bf16_rounded(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
inline __m256i narrow(Vec a, bf16) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_rounded(a), 16));
}
#endif
inline __m256i narrow(Vec a, fp16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, Vec a, Full) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, Tail t) { _mm512_mask_storeu_ps(p, mask_of(t), a.v); }
template <class T>
inline void store(T* p, Vec a, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
inline void store(T* p, Vec a, Tail t) {
  _mm256_mask_storeu_epi16(p, mask_of(t), narrow(a, T{}));
}

inline Vec rounded(Vec a, float) { return a; }
#if defined(__AVX512BF16__)
inline Vec rounded(Vec a, bf16) { return widen(narrow(a, bf16{}), bf16{}); }
#else
inline Vec rounded(Vec a, bf16) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bf16_rounded(a), _mm512_set1_epi32(0xffff0000)))};
}
#endif
inline Vec rounded(Vec a, fp16) { return widen(narrow(a, fp16{}), fp16{}); }

inline Vec clamp(Vec a, float low, float high) {
  // min and max return their second operand for a NaN: the constants go first, so a NaN stays.
  return {_mm512_min_ps(vec(high).v, _mm512_max_ps(vec(low).v, a.v))};
}
inline Vec nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 14 bits from the table, 24 after one Newton step: three short instructions where vdivps takes 16
// cycles. For 1e-35 < |a| < 1e35.
inline Vec reciprocal(Vec a) {
  const Vec r = {_mm512_rcp14_ps(a.v)};
  return fma(fnma(a, r, vec(1.0f)), r, r);
}
inline Vec reciprocal_fast(Vec a) { return {_mm512_rcp14_ps(a.v)}; }

// For matrix products. max gives b where either is a NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
constexpr float kPowerOfZero = -160.0f;  // times_power_of_two then gives 0
constexpr int64_t kTileVectors = 4;      // 4 rows of them are 16 of 32 registers
// Rows of 32-bit elements become columns: of pairs, of fours, then of 128-bit quarters.
inline void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      r[i + 2 * j].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const __m512 a = r[8 * j + i].v, b = r[8 * j + 4 + i].v;
      t[8 * j + i] = _mm512_shuffle_f32x4(a, b, 0x88);
      t[8 * j + 4 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
  }
}
// Lane i is the sum of r[i]: 30 shuffles, where a transpose has 64.
inline Vec lane_sums(Vec (&r)[16]) {
  __m512 t[8];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = r[2 * i].v, b = r[2 * i + 1].v;
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {quarters(quarters(t[0], t[1]), quarters(t[2], t[3]))};
}
#if defined(__AVX512BF16__)
// Two neighbours along the summed dimension, the earlier one low: multiplied and added at once.
struct Pair {
  uint32_t bits;
};
struct Pairs {
  __m512i v;
};
inline Pairs load(const Pair* p, Full) { return {_mm512_loadu_si512(p)}; }
inline Pairs splat(Pair a) { return {_mm512_set1_epi32(static_cast<int>(a.bits))}; }
inline Vec dot(Pairs a, Pairs b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline Vec words(const bf16* p, Full) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
inline Vec words(const bf16* p, Tail t) {
  const auto mask = static_cast<__mmask32>((uint64_t{1} << t.count) - 1);
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
}
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
#endif

#elif defined(__AVX2__)

struct Vec {
  __m256 v;
  static constexpr int64_t size = 8;
};

inline Vec vec(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline Vec widen(__m128i bits, bf16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m128i bits, fp16) { return {_mm256_cvtph_ps(bits)}; }

inline Vec load(const float* p, Full) { return {_mm256_loadu_ps(p)}; }
template <class T>
inline Vec load(const T* p, Full) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
inline Vec load(const T* p, Tail t) {
  T part[Vec::size] = {};
  std::memcpy(part, p, t.count * sizeof(T));
  return load(part, Full{});
}

inline __m256i bf16_rounded(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
inline __m128i narrow(Vec a, bf16) {
  const __m256i high = _mm256_srli_epi32(bf16_rounded(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(Vec a, fp16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, Vec a, Full) { _mm256_storeu_ps(p, a.v); }
template <class T>
inline void store(T* p, Vec a, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
inline void store(T* p, Vec a, Tail t) {
  T part[Vec::size];
  store(part, a, Full{});
  std::memcpy(p, part, t.count * sizeof(T));
}

inline Vec rounded(Vec a, float) { return a; }
inline Vec rounded(Vec a, bf16) {
  return {_mm256_castsi256_ps(_mm256_and_si256(bf16_rounded(a), _mm256_set1_epi32(0xffff0000)))};
}
inline Vec rounded(Vec a, fp16) { return widen(narrow(a, fp16{}), fp16{}); }

inline Vec clamp(Vec a, float low, float high) {
  return {_mm256_min_ps(vec(high).v, _mm256_max_ps(vec(low).v, a.v))};
}
inline Vec nearest(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// For n in [-126, 127].
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return a * Vec{_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
inline Vec reciprocal(Vec a) { return {_mm256_div_ps(vec(1.0f).v, a.v)}; }
inline Vec reciprocal_fast(Vec a) {
  const Vec r = {_mm256_rcp_ps(a.v)};
  return fma(fnma(a, r, vec(1.0f)), r, r);
}

inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float largest(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
constexpr float kPowerOfZero = -127.0f;
constexpr int64_t kTileVectors = 2;  // 4 rows of them are 8 of 16 registers
inline void transpose(Vec (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j].v = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      r[i + 2 * j + 1].v = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    const __m256 a = r[i].v, b = r[4 + i].v;
    r[i].v = _mm256_permute2f128_ps(a, b, 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(a, b, 0x31);
  }
}
inline Vec lane_sums(Vec (&r)[8]) {
  __m256 t[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = r[2 * i].v, b = r[2 * i + 1].v;
    t[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i)
    t[i] = _mm256_add_ps(_mm256_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44),
                         _mm256_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee));
  return {_mm256_add_ps(_mm256_permute2f128_ps(t[0], t[1], 0x20),
                        _mm256_permute2f128_ps(t[0], t[1], 0x31))};
}

#else
#error "compile with the flags of one instruction set (see setup.py)"
#endif

// a rounded to T and back: the named rounding points.
template <class T>
inline Vec round_to(Vec a) {
  return rounded(a, T{});
}

// body(i, Full or Tail) for every vector of a row of n.
template <class Body>
inline void sweep(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) body(i, Full{});
  if (i < n) body(i, Tail{n - i});
}

// The same, with four independent accumulators so that sums don't wait for the adder's latency:
// body(i, part, acc). A short tail's missing elements are zeros.
template <int Sums, class Body>
inline void sweep_sums(int64_t n, float (&sums)[Sums], Body&& body) {
  Vec acc[4][Sums];
  for (auto& lane : acc)
    for (auto& a : lane) a = vec(0.0f);
  int64_t i = 0;
  for (; i + 4 * Vec::size <= n; i += 4 * Vec::size) {
    body(i, Full{}, acc[0]);
    body(i + Vec::size, Full{}, acc[1]);
    body(i + 2 * Vec::size, Full{}, acc[2]);
    body(i + 3 * Vec::size, Full{}, acc[3]);
  }
  for (; i + Vec::size <= n; i += Vec::size) body(i, Full{}, acc[0]);
  if (i < n) body(i, Tail{n - i}, acc[1]);
  for (int s = 0; s < Sums; ++s) sums[s] = sum((acc[0][s] + acc[1][s]) + (acc[2][s] + acc[3][s]));
}

// exp(a) to 1-2 ulp for a in [-80, 80], the range it is clamped to: 2^n e^r with |r| <= ln(2)/2,
// e^r by its Taylor polynomial of degree 6 in Horner form (error under 2^-24 relative).
inline Vec exp_clamped(Vec a) {
  const Vec x = clamp(a, -80.0f, 80.0f);
  const Vec n = nearest(x * vec(1.44269504f));
  const Vec r = fnma(n, vec(-2.12194440e-4f), fnma(n, vec(0.693359375f), x));
  Vec p = vec(1.0f / 720);
  p = fma(p, r, vec(1.0f / 120));
  p = fma(p, r, vec(1.0f / 24));
  p = fma(p, r, vec(1.0f / 6));
  p = fma(p, r, vec(0.5f));
  p = fma(p, r, vec(1.0f));
  p = fma(p, r, vec(1.0f));
  return times_power_of_two(p, n);
}

// sigmoid(a) = 1 / (1 + e) with e = exp(-a); 1 - sigmoid(a) = e sigmoid(a), without cancellation.
inline Vec exp_of_minus(Vec a, float) { return exp_clamped(vec(0.0f) - a); }
inline Vec sigmoid_from(Vec e, float) { return reciprocal(vec(1.0f) + e); }

// For values that are rounded to 11 bits or fewer next: 2^n 2^f with |f| <= 1/2, 2^f by a minimax
// polynomial (3e-6 relative), and a 14-bit reciprocal. A third fewer instructions, which shows as
// long as the row is in a cache.
inline Vec exp2_fast(Vec t) {
  const Vec n = nearest(t);
  const Vec f = t - n;
  Vec p = vec(9.57010221e-3f);
  p = fma(p, f, vec(5.59178628e-2f));
  p = fma(p, f, vec(2.40247443e-1f));
  p = fma(p, f, vec(6.93121791e-1f));
  p = fma(p, f, vec(9.99999285e-1f));
  return times_power_of_two(p, n);
}
template <class Half>
inline Vec exp_of_minus(Vec a, Half) {
  return exp2_fast(clamp(a * vec(-1.44269504f), -126.0f, 126.0f));
}
template <class Half>
inline Vec sigmoid_from(Vec e, Half) {
  return reciprocal_fast(vec(1.0f) + e);
}
template <class T>
inline Vec sigmoid(Vec a, T type) {
  return sigmoid_from(exp_of_minus(a, type), type);
}

// An operand of a matrix product: a float, or a pair of bf16 where the processor multiplies pairs.
template <class T>
struct Operand {
  using Word = float;
  static constexpr int64_t per = 1;  // elements of T in a Word
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using Word = Pair;
  static constexpr int64_t per = 2;
};
#else
inline Vec stacked(Vec low, Vec) { return low; }
#endif
template <class T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) _mm_prefetch(p + i, _MM_HINT_T1);
}
inline Vec splat(float a) { return vec(a); }
inline Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
// A vector of words, as its bits: from a row along the summed dimension, or from `per` rows across.
template <class T, class Part>
inline Vec words(const T* p, Part part) {
  return load(p, part);
}
template <class T, class Part>
inline Vec stacked(const T* low, const T*, Part part) {
  return load(low, part);
}

// 2^a for a up to 127, exactly 0 for a <= -160: by the polynomials above, to 2e-9 for float.
inline Vec exp2_of(Vec a, float) {
  const Vec t = clamp(a, kPowerOfZero, 127.0f);
  const Vec n = nearest(t);
  const Vec f = t - n;
  Vec p = vec(1.534580358e-4f);
  p = fma(p, f, vec(1.339993115e-3f));
  p = fma(p, f, vec(9.618488988e-3f));
  p = fma(p, f, vec(5.550328777e-2f));
  p = fma(p, f, vec(2.402264689e-1f));
  p = fma(p, f, vec(6.931472057e-1f));
  p = fma(p, f, vec(1.0f));
  return times_power_of_two(p, n);
}
template <class Half>
inline Vec exp2_of(Vec a, Half) {
  return exp2_fast(clamp(a, kPowerOfZero, 127.0f));
}
