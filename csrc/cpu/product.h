// Small matrix products C (+)= A B in float: the elements of A are broadcast, the rows of B are
// vectors. Operands are packed as words (Operand<T>), one or two elements along the summed
// dimension; a tile of C stays in registers while its sum runs.
#pragma once

#include <algorithm>

#include "vec.h"

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileColumns = kTileVectors * Vec::size;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <int M, int N, class Word>
inline void product_tile(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t depth, bool add) {
  Vec acc[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = vec(0.0f);
  for (int64_t k = 0; k < depth; ++k, b += b_row) {
    decltype(load(b, Full{})) column[N];
    for (int j = 0; j < N; ++j) column[j] = load(b + j * Vec::size, Full{});
    for (int i = 0; i < M; ++i) {
      const auto row = splat(a[i * a_row + k]);
      for (int j = 0; j < N; ++j) acc[i][j] = dot(row, column[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      // Added at the end: sums of sums lose less than one long sum.
      float* at = c + i * c_row + j * Vec::size;
      store(at, add ? load(at, Full{}) + acc[i][j] : acc[i][j], Full{});
    }
}

template <int N, class Word>
inline void product_panel(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c,
                          int64_t c_row, int64_t rows, int64_t depth, bool add) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row)
    product_tile<kTileRows, N>(a, a_row, b, b_row, c, c_row, depth, add);
  switch (rows) {
    case 3: return product_tile<3, N>(a, a_row, b, b_row, c, c_row, depth, add);
    case 2: return product_tile<2, N>(a, a_row, b, b_row, c, c_row, depth, add);
    case 1: return product_tile<1, N>(a, a_row, b, b_row, c, c_row, depth, add);
  }
}

// C [rows, columns] (+)= A [rows, depth words] B [depth words, columns], columns in whole vectors.
template <class Word>
inline void product(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c,
                    int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
  for (; columns >= kTileColumns; columns -= kTileColumns, b += kTileColumns, c += kTileColumns)
    product_panel<kTileVectors>(a, a_row, b, b_row, c, c_row, rows, depth, add);
  // Fewer vectors in panels of their own: one at a time would wait for the sum's latency.
  if constexpr (kTileVectors > 2) {
    if (columns == 3 * Vec::size)
      return product_panel<3>(a, a_row, b, b_row, c, c_row, rows, depth, add);
    if (columns == 2 * Vec::size)
      return product_panel<2>(a, a_row, b, b_row, c, c_row, rows, depth, add);
  }
  if (columns > 0) product_panel<1>(a, a_row, b, b_row, c, c_row, rows, depth, add);
}

template <class T>
using Word = typename Operand<T>::Word;

template <class T>
constexpr int64_t words_of(int64_t elements) {
  return (elements + Operand<T>::per - 1) / Operand<T>::per;
}

template <class T>
inline Vec row_words(const T* row, int64_t at, int64_t width) {
  constexpr int64_t step = Vec::size * Operand<T>::per;
  const int64_t left = width - at;
  if (left >= step) return words(row + at, Full{});
  return left > 0 ? words(row + at, Tail{left}) : vec(0.0f);
}

// An operand A from rows: row(i) points to `width` elements. out [rows, out_row].
template <class T, class Row>
inline void pack_rows(Row&& row, int64_t rows, int64_t width, Word<T>* out, int64_t out_row) {
  float* bits = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t w = 0; w < out_row; w += Vec::size)
      store(bits + i * out_row + w, row_words<T>(row(i), w * Operand<T>::per, width), Full{});
}

// The same rows as columns: out [words of width, out_row], with zeros up to a whole vector of rows.
template <class T, class Row>
inline void pack_columns(Row&& row, int64_t rows, int64_t width, Word<T>* out, int64_t out_row) {
  float* bits = reinterpret_cast<float*>(out);
  const int64_t depth = words_of<T>(width);
  for (int64_t r = 0; r < rows; r += Vec::size)
    for (int64_t w = 0; w < depth; w += Vec::size) {
      Vec block[Vec::size];
      for (int64_t i = 0; i < Vec::size; ++i)
        block[i] = r + i < rows ? row_words<T>(row(r + i), w * Operand<T>::per, width) : vec(0.0f);
      transpose(block);
      const int64_t count = std::min<int64_t>(Vec::size, depth - w);
      for (int64_t i = 0; i < count; ++i) store(bits + (w + i) * out_row + r, block[i], Full{});
    }
}

// The rows stacked along the summed dimension: out [words of rows, out_row], out_row whole vectors.
template <class T, class Row>
inline void pack_stacked(Row&& row, int64_t rows, int64_t width, Word<T>* out, int64_t out_row) {
  constexpr int64_t per = Operand<T>::per;
  for (int64_t i = 0; i < rows; i += per) {
    const T* low = row(i);
    const T* high = per == 2 && i + 1 < rows ? row(i + 1) : nullptr;
    float* bits = reinterpret_cast<float*>(out) + i / per * out_row;
    sweep(width, [&](int64_t d, auto part) {
      store(bits + d, stacked(low + d, high == nullptr ? nullptr : high + d, part), Full{});
    });
  }
}
