// Vec by AVX-512: 16 floats. Only vec.h includes this file.
#pragma once

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
// One instruction instead of seven. It flushes denormals to zero, on input and on output.
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
  // If either operand is a NaN, min and max return the second one: so the constants go first.
  return {_mm512_min_ps(vec(high).v, _mm512_max_ps(vec(low).v, a.v))};
}
// For each lane whether x < limit, which no NaN is.
inline bool any_below(Vec x, float limit) {
  return _mm512_cmp_ps_mask(x.v, vec(limit).v, _CMP_LT_OQ) != 0;
}
inline Vec where_below(Vec x, float limit, Vec then, Vec otherwise) {
  const __mmask16 below = _mm512_cmp_ps_mask(x.v, vec(limit).v, _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(below, otherwise.v, then.v)};
}
inline Vec nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// For 1e-35 < |a| < 1e35: 14 bits from the table, 24 after one Newton step. These are three short
// instructions, vdivps takes 16 cycles.
inline Vec reciprocal(Vec a) {
  const Vec r = {_mm512_rcp14_ps(a.v)};
  return fma(fnma(a, r, vec(1.0f)), r, r);
}
inline Vec reciprocal_fast(Vec a) { return {_mm512_rcp14_ps(a.v)}; }

// Gives b if either is a NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

constexpr float kPowerOfZero = -160.0f;  // times_power_of_two then gives 0

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

// Lane i is the sum of r[i]. It takes 30 shuffles, a transpose would take 64.
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
