// Small matrix products C (+)= A B in float: the elements of A are broadcast, the rows of B are
// vectors. Operands are lanes (simd/operand.h); a tile of C stays in registers while its sum runs.
#pragma once

#include "cpu/simd/amx_product.h"

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileVectors = Vec::size == 16 ? 4 : 2;  // 4 rows of them are half the registers
constexpr int64_t kTileColumns = kTileVectors * Vec::size;

// Always inline: a tile is so little work that a call would show.
template <int M, int N, class Lane>
[[gnu::always_inline]] inline void product_tile(Matrix<Lane> a, Matrix<Lane> b, Matrix<float> c,
                                                int64_t depth, bool add) {
  Vec acc[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = vec(0.0f);
  for (int64_t k = 0; k < depth; ++k, b.data += b.stride) {
    decltype(load(b.data, Full{})) column[N];
    for (int j = 0; j < N; ++j) column[j] = load(b.data + j * Vec::size, Full{});
    for (int i = 0; i < M; ++i) {
      const auto row = splat(a.data[i * a.stride + k]);
      for (int j = 0; j < N; ++j) acc[i][j] = dot(row, column[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      // Added at the end: sums of sums lose less than one long sum.
      float* at = c.data + i * c.stride + j * Vec::size;
      store(at, add ? load(at, Full{}) + acc[i][j] : acc[i][j], Full{});
    }
}

template <int N, class Lane>
inline void product_panel(Matrix<Lane> a, Matrix<Lane> b, Matrix<float> c, int64_t rows,
                          int64_t depth, bool add) {
  for (; rows >= kTileRows; rows -= kTileRows, a = a.from(kTileRows, 0), c = c.from(kTileRows, 0))
    product_tile<kTileRows, N>(a, b, c, depth, add);
  switch (rows) {
    case 3: return product_tile<3, N>(a, b, c, depth, add);
    case 2: return product_tile<2, N>(a, b, c, depth, add);
    case 1: return product_tile<1, N>(a, b, c, depth, add);
  }
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns], columns in whole vectors.
template <class Lane>
[[gnu::noinline]] void product(Matrix<Lane> a, Matrix<Lane> b, Matrix<float> c, int64_t rows,
                               int64_t columns, int64_t depth, bool add) {
  for (; columns >= kTileColumns; columns -= kTileColumns) {
    product_panel<kTileVectors>(a, b, c, rows, depth, add);
    b = b.from(0, kTileColumns);
    c = c.from(0, kTileColumns);
  }
  // Fewer vectors in panels of their own: one at a time would wait for the sum's latency.
  if constexpr (kTileVectors > 2) {
    if (columns == 3 * Vec::size) return product_panel<3>(a, b, c, rows, depth, add);
    if (columns == 2 * Vec::size) return product_panel<2>(a, b, c, rows, depth, add);
  }
  if (columns > 0) product_panel<1>(a, b, c, rows, depth, add);
}
