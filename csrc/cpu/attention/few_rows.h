// Attention of so few rows that gathering keys and values would cost as much as the products: keys
// and values are read where they lie, head_dim in whole panels.
#pragma once

#include "cpu/attention/tile.h"

template <class T>
constexpr bool few_rows(int64_t rows, int64_t head_dim) {
  return Operand<T>::per == 1 && rows <= kTileRows && head_dim % kTileColumns == 0;
}

// scores[i, j] = q_i k_j for up to kTileRows rows and kKeyBlock keys. A tree adds up the lanes of 4
// rows by some keys at once.
template <class T>
[[gnu::noinline]] void few_scores(Matrix<const float> q, SeenRows<const T> k, float* scores,
                                 int64_t rows, int64_t keys, int64_t head_dim) {
  constexpr int64_t kKeys = Vec::size / kTileRows;
  const float* query[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) query[i] = q.row(std::min(i, rows - 1));
  for (int64_t j = 0; j < keys; j += kKeys) {
    const T* key[kKeys];
    for (int64_t n = 0; n < kKeys; ++n) key[n] = k(std::min(j + n, keys - 1));
    Vec acc[Vec::size];
    for (auto& a : acc) a = vec(0.0f);
    for (int64_t d = 0; d < head_dim; d += Vec::size) {
      Vec column[kKeys];
      for (int64_t n = 0; n < kKeys; ++n) column[n] = load(key[n] + d, Full{});
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Vec row = load(query[i] + d, Full{});
        for (int64_t n = 0; n < kKeys; ++n)
          acc[i * kKeys + n] = fma(row, column[n], acc[i * kKeys + n]);
      }
    }
    float sums[Vec::size];
    store(sums, lane_sums(acc), Full{});
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(sums + i * kKeys, kKeys, scores + i * kKeyBlock + j);
  }
}

// total_i += sum of weights[i, j] v_j over the keys.
template <class T>
[[gnu::noinline]] void few_totals(const float* weights, SeenRows<const T> v, Matrix<float> total,
                                 int64_t rows, int64_t keys) {
  const float* weight[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) weight[i] = weights + std::min(i, rows - 1) * kKeyBlock;
  for (int64_t d = 0; d < total.stride; d += kTileColumns) {
    Vec acc[kTileRows][kTileVectors];
    for (auto& row : acc)
      for (auto& a : row) a = vec(0.0f);
    for (int64_t j = 0; j < keys; ++j) {
      const T* value = v(j) + d;
      for (int64_t n = 0; n < kTileVectors; ++n) {
        const Vec column = load(value + n * Vec::size, Full{});
        for (int64_t i = 0; i < kTileRows; ++i)
          acc[i][n] = fma(vec(weight[i][j]), column, acc[i][n]);
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < kTileVectors; ++n) {
        float* at = total.row(i) + d + n * Vec::size;
        store(at, load(at, Full{}) + acc[i][n], Full{});
      }
  }
}
