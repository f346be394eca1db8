// One vector of floats, loaded from and stored to float, bfloat16 and float16. It is compiled once
// per instruction set: the compiler's flags choose between the two files that define it. Half types
// exist in memory only. Arithmetic is float, and round_to<T> is the one way to round.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "shared/dtypes.h"

// How much of a vector a step covers: all of it, or the `count` elements that are left in a row.
struct Full {};
struct Tail {
  int64_t count;
};

#if defined(__AVX512F__)
#include "cpu/simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/vec_avx2.h"
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

// The same with sums over the row: body(i, part, acc) adds to acc[0], acc[1], ... Four sets of
// accumulators don't wait for the adder's latency. Elements that a tail lacks are zeros.
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

// `count` elements from p on, into the second-level cache.
template <class T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) _mm_prefetch(p + i, _MM_HINT_T1);
}
