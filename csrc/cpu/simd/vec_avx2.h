// Vec by AVX2, FMA and F16C: 8 floats. Only vec.h includes this file.
#pragma once

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
// For each lane whether x < limit, which no NaN is.
inline bool any_below(Vec x, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.v, vec(limit).v, _CMP_LT_OQ)) != 0;
}
inline Vec where_below(Vec x, float limit, Vec then, Vec otherwise) {
  return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(x.v, vec(limit).v, _CMP_LT_OQ))};
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
