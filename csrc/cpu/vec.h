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

// Bfloat16 lanes in pairs: each 32-bit lane meets one lane of a Vec.
struct Words {
  __m512i v;
  static constexpr int64_t size = 32;
};

inline Words load_words(const void* p, Full) { return {_mm512_loadu_si512(p)}; }
inline Words load_words(const void* p, Tail t) {
  return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << t.count) - 1), p)};
}
inline void store_words(void* p, Words w) { _mm512_storeu_si512(p, w.v); }
inline void store_words(void* p, Words w, Tail t) {
  _mm512_mask_storeu_epi16(p, static_cast<__mmask32>((1ull << t.count) - 1), w.v);
}
inline Vec even_lanes(Words w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16))}; }
inline Vec odd_lanes(Words w) {
  return {_mm512_castsi512_ps(_mm512_and_si512(w.v, _mm512_set1_epi32(0xffff0000)))};
}
// 16 + q in bfloat16 for nibble `Phase` of each 16-bit lane: q goes to the top of the mantissa.
template <int Phase>
inline Words sixteen_plus_nibble(Words w) {
  __m512i moved;
  if constexpr (Phase == 0)
    moved = _mm512_slli_epi16(w.v, 3);
  else
    moved = _mm512_srli_epi16(w.v, 4 * Phase - 3);
  // (moved & 0x78) | 0x4180
  return {_mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(0x78), _mm512_set1_epi16(0x4180),
                                    0xea)};
}
// The floats of unsigned bytes less 128, and of the nibbles of 32-bit words.
inline Vec load_bytes_less_128(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i s = _mm_xor_si128(b, _mm_set1_epi8(static_cast<char>(0x80)));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(s))};
}
inline Vec load_nibbles(const uint8_t* p) {
  int64_t words;
  std::memcpy(&words, p, 8);
  // Words 0 and 1 in the even and odd lanes of 32 bits: each of them to eight lanes.
  const __m512i spread = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_set1_epi64(words));
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i q = _mm512_and_si512(_mm512_srlv_epi32(spread, shifts), _mm512_set1_epi32(15));
  return {_mm512_cvtepi32_ps(q)};
}
// Lane i of the result is lane first + i / run of a (run 4, 8 or 16).
inline Vec spread(Vec a, int first, int log2_run) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i from = _mm512_add_epi32(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(log2_run)),
                                        _mm512_set1_epi32(first));
  return {_mm512_permutexvar_ps(from, a.v)};
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
// The 128 weights of a packed segment, in order.
inline void unpack_segment(const uint8_t* p, const Exponents& table, Words (&out)[4]) {
  const __m512i pairs = _mm512_loadu_si512(p + 128), nibble = _mm512_set1_epi8(15);
  const __m512i codes[2] = {_mm512_and_si512(pairs, nibble),
                            _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble)};
  for (int i = 0; i < 2; ++i) {
    const __m512i bytes = _mm512_loadu_si512(p + 64 * i), mask = _mm512_set1_epi8(0x7f);
    // sign from the byte, exponent bits from the table; exponent's last bit, mantissa.
    const __m512i high = _mm512_ternarylogic_epi32(
        bytes, mask, _mm512_shuffle_epi8(table.high, codes[i]), 0xba);
    const __m512i low =
        _mm512_ternarylogic_epi32(bytes, mask, _mm512_shuffle_epi8(table.low, codes[i]), 0xea);
    out[2 * i] = {_mm512_unpacklo_epi8(low, high)};
    out[2 * i + 1] = {_mm512_unpackhi_epi8(low, high)};
  }
}

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

struct Words {
  __m256i v;
  static constexpr int64_t size = 16;
};

inline Words load_words(const void* p, Full) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
inline Words load_words(const void* p, Tail t) {
  uint16_t part[Words::size] = {};
  std::memcpy(part, p, t.count * 2);
  return load_words(part, Full{});
}
inline void store_words(void* p, Words w) { _mm256_storeu_si256(static_cast<__m256i*>(p), w.v); }
inline void store_words(void* p, Words w, Tail t) {
  uint16_t part[Words::size];
  store_words(part, w);
  std::memcpy(p, part, t.count * 2);
}
inline Vec even_lanes(Words w) { return {_mm256_castsi256_ps(_mm256_slli_epi32(w.v, 16))}; }
inline Vec odd_lanes(Words w) {
  return {_mm256_castsi256_ps(_mm256_and_si256(w.v, _mm256_set1_epi32(0xffff0000)))};
}
template <int Phase>
inline Words sixteen_plus_nibble(Words w) {
  __m256i moved;
  if constexpr (Phase == 0)
    moved = _mm256_slli_epi16(w.v, 3);
  else
    moved = _mm256_srli_epi16(w.v, 4 * Phase - 3);
  return {_mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi16(0x78)),
                          _mm256_set1_epi16(0x4180))};
}
inline Vec load_bytes_less_128(const uint8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i s = _mm_xor_si128(b, _mm_set1_epi8(static_cast<char>(0x80)));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(s))};
}
inline Vec load_nibbles(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i q = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(q, _mm256_set1_epi32(15)))};
}
inline Vec spread(Vec a, int first, int log2_run) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i from = _mm256_add_epi32(_mm256_srl_epi32(lane, _mm_cvtsi32_si128(log2_run)),
                                        _mm256_set1_epi32(first));
  return {_mm256_permutevar8x32_ps(a.v, from)};
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
inline void unpack_segment(const uint8_t* p, const Exponents& table, Words (&out)[8]) {
  const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i mantissa = _mm256_set1_epi8(0x7f);
  for (int i = 0; i < 4; ++i) {  // 32 bytes: halves of the columns 0..31 and 32..63 of 64
    const __m256i pairs = load_words(p + 128 + 32 * (i % 2), Full{}).v;
    const __m256i codes = _mm256_and_si256(i < 2 ? pairs : _mm256_srli_epi16(pairs, 4), nibble);
    const __m256i bytes = load_words(p + 32 * i, Full{}).v;
    const __m256i high = _mm256_or_si256(_mm256_and_si256(bytes, sign),
                                         _mm256_shuffle_epi8(table.high, codes));
    const __m256i low = _mm256_or_si256(_mm256_and_si256(bytes, mantissa),
                                        _mm256_shuffle_epi8(table.low, codes));
    const int at = 4 * (i / 2) + i % 2;
    out[at] = {_mm256_unpacklo_epi8(low, high)};
    out[at + 2] = {_mm256_unpackhi_epi8(low, high)};
  }
}

#else
#error "compile with the flags of one instruction set (see setup.py)"
#endif

// acc + the products of bfloat16 pairs: with bfloat16 lanes at x in one instruction, or with floats,
// those of the even lanes first, then those of the odd ones.
inline Vec dot(Words w, const float* x, Vec acc) {
  acc = fma(even_lanes(w), load(x, Full{}), acc);
  return fma(odd_lanes(w), load(x + Vec::size, Full{}), acc);
}
// The same with the lanes less 24: 16 + q becomes q - 8, which is centred.
inline Vec dot_less_24(Words w, const float* x, Vec acc) {
  acc = fma(even_lanes(w) - vec(24.0f), load(x, Full{}), acc);
  return fma(odd_lanes(w) - vec(24.0f), load(x + Vec::size, Full{}), acc);
}
#if defined(__AVX512BF16__)
inline Vec dot(Words w, const bf16* x, Vec acc) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_loadu_si512(x))};
}
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
template <class Half>
inline Vec exp_of_minus(Vec a, Half) {
  const Vec t = clamp(a * vec(-1.44269504f), -126.0f, 126.0f);
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
inline Vec sigmoid_from(Vec e, Half) {
  return reciprocal_fast(vec(1.0f) + e);
}
template <class T>
inline Vec sigmoid(Vec a, T type) {
  return sigmoid_from(exp_of_minus(a, type), type);
}
