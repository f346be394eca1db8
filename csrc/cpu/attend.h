// Attention of a tile of queries that share one key/value head: softmax(scale q k^T) v by blocks of
// keys, with the softmax rescaled as its maximum grows, so that scores never leave the caches.
//
// 4 n d operations a row over n keys. Of bf16 at head_dim 64 that is 64 pair products for a vector
// of 16 scores, beside some 20 instructions of softmax. Keys are transposed and values paired once
// a block for all rows of the tile: 2% of the work for 256 rows, half of it for the 4 of one token.
#pragma once

#include <cmath>
#include <limits>

#include "product.h"

// A block's packed keys and values are 16 KB each for bf16 at head_dim 64. Half as many keys a
// block were slower: each block ends with a maximum and a sum across its lanes.
constexpr int64_t kKeyBlock = 128;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896340736f;

// The floats of scratch that attend_tile needs, whatever the number of keys. They need no
// alignment, but are faster from a multiple of 64 bytes on.
constexpr int64_t attend_scratch(int64_t rows, int64_t head_dim) {
  const int64_t width = round_up(head_dim, Vec::size);
  return rows * (2 * width + Vec::size) + round_up(rows, 16) + 2 * kKeyBlock * width +
         2 * kTileRows * kKeyBlock;
}

// One row of scores, the first `seen` of them of keys it sees, to probabilities 2^(c s - top) in
// p[0, count), zeros where it sees nothing. Adds them to `sum`; whether the maximum grew, and by
// which factor everything summed before must shrink then.
template <class T>
inline bool softmax_block(float* s, Word<T>* p, int64_t seen, int64_t count, float c, float& top,
                          float* sum, Vec& shrink) {
  std::fill(s + seen, s + count, kNothing);
  Vec largest_of = vec(kNothing);
  for (int64_t i = 0; i < count; i += Vec::size)
    largest_of = max(load(s + i, Full{}) * vec(c), largest_of);
  const float before = top;
  top = std::max(before, largest(largest_of));
  // A row that has seen nothing yet: any finite maximum does.
  const Vec shift = vec(top == kNothing ? 0.0f : top);
  Vec total = vec(0.0f);
  for (int64_t i = 0; i < count; i += Vec::size) {
    const Vec e = exp2_of(load(s + i, Full{}) * vec(c) - shift, T{});
    total = total + e;
    if constexpr (Operand<T>::per == 2) {
      store(reinterpret_cast<T*>(p) + i, e, Full{});
    } else {
      store(p + i, e, Full{});
    }
  }
  const bool grown = before != top;
  if (grown) shrink = exp2_of(vec(before - top), float{});
  store(sum, grown ? fma(load(sum, Full{}), shrink, total) : load(sum, Full{}) + total, Full{});
  return grown;
}

// Whether all rows of a head are so few that packing keys and values would cost as much as the
// products: they are then read as they lie in memory, head_dim in whole panels.
template <class T>
constexpr bool few_rows(int64_t rows, int64_t head_dim) {
  return Operand<T>::per == 1 && rows <= kTileRows && head_dim % kTileColumns == 0;
}

// A tree adds up 4 rows, of float words, by some keys at once.
template <class T, class K>
inline void few_scores(const float* q, int64_t q_row, K&& k, float* scores, int64_t rows,
                       int64_t keys, int64_t head_dim) {
  constexpr int64_t kKeys = Vec::size / kTileRows;
  const float* query[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) query[i] = q + std::min(i, rows - 1) * q_row;
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

template <class T, class V>
inline void few_totals(const float* weights, V&& v, float* total, int64_t width, int64_t rows,
                       int64_t keys) {
  const float* weight[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) weight[i] = weights + std::min(i, rows - 1) * kKeyBlock;
  for (int64_t d = 0; d < width; d += kTileColumns) {
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
        float* at = total + i * width + d + n * Vec::size;
        store(at, load(at, Full{}) + acc[i][n], Full{});
      }
  }
}

// q(r), k(j), v(j), out(r): pointers to head_dim packed elements. Row r sees the keys
// [0, limit(r)), limit never falling. lse(r, value) is given log2 of the sum of 2^(scale log2(e)
// s), -inf where no key is seen.
template <class T, class Q, class K, class V, class Limit, class Out, class Lse>
inline void attend_tile(Q&& q, int64_t rows, K&& k, V&& v, Limit&& limit, int64_t head_dim,
                        float scale, Out&& out, Lse&& lse, bool one_tile, float* scratch) {
  const int64_t width = round_up(head_dim, Vec::size), depth = words_of<T>(head_dim);
  const int64_t q_row = round_up(depth, Vec::size);
  auto take = [&](int64_t floats) {
    float* taken = scratch;
    scratch += floats;
    return taken;
  };
  auto* queries = reinterpret_cast<Word<T>*>(take(rows * width));
  float* total = take(rows * width);
  float* sums = take(rows * Vec::size);
  float* tops = take(round_up(rows, 16));
  auto* keys = reinterpret_cast<Word<T>*>(take(kKeyBlock * width));
  auto* values = reinterpret_cast<Word<T>*>(take(kKeyBlock * width));
  float* scores = take(kTileRows * kKeyBlock);
  auto* weights = reinterpret_cast<Word<T>*>(take(kTileRows * kKeyBlock));
  pack_rows<T>(q, rows, head_dim, queries, q_row);
  std::fill(total, total + rows * width, 0.0f);
  std::fill(sums, sums + rows * Vec::size, 0.0f);
  std::fill(tops, tops + rows, kNothing);

  const bool few = one_tile && few_rows<T>(rows, head_dim);
  const int64_t end = limit(rows - 1);
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    const int64_t block = std::min(kKeyBlock, end - first);
    // Rows of one head lie apart: without this the processor sees 16 streams, and prefetches none.
    for (int64_t j = first + kKeyBlock; rows <= 16 && j < std::min(first + 2 * kKeyBlock, end);
         ++j) {
      prefetch(k(j), head_dim);
      prefetch(v(j), head_dim);
    }
    const auto key = [&](int64_t j) { return k(first + j); };
    const auto value = [&](int64_t j) { return v(first + j); };
    if (!few) {
      pack_columns<T>(key, block, head_dim, keys, kKeyBlock);
      pack_stacked<T>(value, block, head_dim, values, width);
    }
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t tile = std::min(kTileRows, rows - r);
      const int64_t seen = std::min(block, limit(r + tile - 1) - first);
      if (seen <= 0) continue;
      const int64_t count = round_up(seen, Vec::size);
      if constexpr (Operand<T>::per == 1)
        if (few) few_scores<T>(queries, q_row, key, scores, tile, seen, head_dim);
      if (!few)
        product(queries + r * q_row, q_row, keys, kKeyBlock, scores, kKeyBlock, tile, count, depth,
                false);
      for (int64_t i = 0; i < tile; ++i) {
        const int64_t own = std::clamp<int64_t>(limit(r + i) - first, 0, seen);
        Vec shrink;
        float* row = total + (r + i) * width;
        if (softmax_block<T>(scores + i * kKeyBlock, weights + i * kKeyBlock, own, count,
                             scale * kLog2e, tops[r + i], sums + (r + i) * Vec::size, shrink))
          for (int64_t d = 0; d < width; d += Vec::size)
            store(row + d, load(row + d, Full{}) * shrink, Full{});
      }
      if constexpr (Operand<T>::per == 1)
        if (few) few_totals<T>(weights, value, total, width, tile, seen);
      if (!few)
        product(weights, kKeyBlock, values, width, total + r * width, width, tile, width,
                words_of<T>(seen), true);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float weight = sum(load(sums + r * Vec::size, Full{}));
    const bool none = limit(r) <= 0;
    const Vec share = vec(none ? 0.0f : 1.0f / weight);
    T* to = out(r);
    sweep(head_dim, [&](int64_t d, auto part) {
      store(to + d, load(total + r * width + d, part) * share, part);
    });
    lse(r, none ? kNothing : tops[r] + std::log2(weight));
  }
}

// One new token over a cache: `group` query heads over the first `keys` keys of the head they
// share. Rows of head_dim are packed, the strides are between heads and between keys. Scratch:
// attend_scratch(group, head_dim) floats.
template <class T>
inline void attend_token(const T* q, int64_t group, int64_t q_stride, const T* k, int64_t k_stride,
                         const T* v, int64_t v_stride, int64_t keys, int64_t head_dim, float scale,
                         T* out, int64_t out_stride, float* scratch) {
  attend_tile<T>([&](int64_t r) { return q + r * q_stride; }, group,
                 [&](int64_t j) { return k + j * k_stride; },
                 [&](int64_t j) { return v + j * v_stride; }, [&](int64_t) { return keys; },
                 head_dim, scale, [&](int64_t r) { return out + r * out_stride; },
                 [](int64_t, float) {}, true, scratch);
}
