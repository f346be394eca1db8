// Matrix products of pairs of bfloat16 by AMX tiles. Operands (operand.h) lie as tiles want them:
// rows of lanes along the sum, and rows of lanes across it.
//
// Two tiles of A by two of B give four products of 16 cycles for four loads of 8, which run beside
// them: 512 pairs of factors a cycle, where vdpbf16ps has 21. Four sums hide the latency of 52
// cycles. Its loop has 4 products, 4 loads and 7 other instructions, and spills nothing.
#pragma once

#include "cpu/simd/operand.h"

#if defined(ELMKERNELS_AMX)

// C for M tiles of A by N of B. Registers: 0 to 3 for C, 4 and 5 for A, 6 and 7 for B. (The
// intrinsics want them as literals.)
template <int M, int N>
inline void amx_product(Matrix<Bf16Pair> a, Matrix<Bf16Pair> b, Matrix<float> c, int64_t depth,
                        bool add) {
  const int64_t a_row = a.stride * 4, b_row = b.stride * 4, c_row = c.stride * 4;
  float *c0 = c.data, *c2 = c.row(kAmxRows);
  if (add) {
    _tile_loadd(0, c0, c_row);
    if constexpr (N > 1) _tile_loadd(1, c0 + kAmxLanes, c_row);
    if constexpr (M > 1) _tile_loadd(2, c2, c_row);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c2 + kAmxLanes, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kAmxLanes) {
    _tile_loadd(4, a.data + k, a_row);
    _tile_loadd(6, b.row(k), b_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, b.row(k) + kAmxLanes, b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a.row(kAmxRows) + k, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c0, c_row);
  if constexpr (N > 1) _tile_stored(1, c0 + kAmxLanes, c_row);
  if constexpr (M > 1) _tile_stored(2, c2, c_row);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c2 + kAmxLanes, c_row);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns], columns and depth in whole tiles. Rows
// too: A and C have room for those behind the last one, which C gets from whatever A has there.
[[gnu::noinline]] inline void product(Matrix<Bf16Pair> a, Matrix<Bf16Pair> b, Matrix<float> c,
                                       int64_t rows, int64_t columns, int64_t depth, bool add) {
  Amx::see_memory();
  for (; rows > 0; rows -= 2 * kAmxRows) {
    for (int64_t n = 0; n < columns; n += 2 * kAmxLanes) {
      const bool wide = n + kAmxLanes < columns;
      const Matrix<Bf16Pair> panel = b.from(0, n);
      const Matrix<float> to = c.from(0, n);
      if (rows > kAmxRows)
        wide ? amx_product<2, 2>(a, panel, to, depth, add)
             : amx_product<2, 1>(a, panel, to, depth, add);
      else
        wide ? amx_product<1, 2>(a, panel, to, depth, add)
             : amx_product<1, 1>(a, panel, to, depth, add);
    }
    a = a.from(2 * kAmxRows, 0);
    c = c.from(2 * kAmxRows, 0);
  }
}

#endif
