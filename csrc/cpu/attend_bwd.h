// The backward of attend.h, for a tile of queries and the keys of one chunk. With P = softmax:
//   dV = P^T dO,  dS = P (dO V^T - delta),  delta = rowsum(dO O),  dK = scale dS^T Q,
//   dQ = scale dS K.
// P is computed again from the saved lse, transposed: a vector holds one key's scores for 16 rows.
// So no row is ever reduced, K and V are operands as they lie, and P^T and dS^T, rounded, are the
// operands of the products that follow. 10 n d operations a row over n keys.
#pragma once

#include "attend.h"

constexpr int64_t kBwdRows = 64;  // the rows of a tile: a panel of the products

// What a tile of queries needs of scratch, beside its chunk's dK and dV [keys, width].
constexpr int64_t attend_bwd_scratch(int64_t head_dim) {
  const int64_t width = round_up(head_dim, Vec::size);
  return (6 * kBwdRows + 4 * kKeyBlock) * width + (2 + 5 * kKeyBlock) * kBwdRows;
}

// Scores s and their gradients' dot products dp of one key, to P and dS. p and ds are rows of
// elements along the queries; ds as floats stays in dp.
template <class T>
inline void softmax_bwd(const float* s, float* dp, const float* lse, const float* delta, float c,
                        Word<T>* p, Word<T>* ds, int64_t rows) {
  using Stored = std::conditional_t<Operand<T>::per == 2, T, float>;
  for (int64_t r = 0; r < rows; r += Vec::size) {
    const Vec weight = exp2_of(load(s + r, Full{}) * vec(c) - load(lse + r, Full{}), T{});
    const Vec slope = weight * (load(dp + r, Full{}) - load(delta + r, Full{}));
    store(reinterpret_cast<Stored*>(p) + r, weight, Full{});
    store(reinterpret_cast<Stored*>(ds) + r, slope, Full{});
    store(dp + r, slope, Full{});
  }
}

// Two keys' rows of dS along the summed dimension of dQ.
template <class T>
inline void stack_keys(const float* low, const float* high, Word<T>* out, int64_t rows) {
  if constexpr (Operand<T>::per == 2)
    for (int64_t r = 0; r < rows; r += Vec::size) {
      const Vec second = high == nullptr ? vec(0.0f) : load(high + r, Full{});
      store(reinterpret_cast<float*>(out) + r, stacked(load(low + r, Full{}), second), Full{});
    }
}

// q(r), o(r), dout(r), lse(r), limit(r) as in attend_tile; k(j), v(j) for j in [begin, end), the
// chunk. Adds to dk and dv, float [end - begin, width], dk without its scale; gives dq(r, row),
// float without its scale, of the chunk's keys.
template <class T, class Q, class O, class DO, class Lse, class K, class V, class Limit, class DQ>
inline void attend_tile_bwd(Q&& q, O&& o, DO&& dout, Lse&& lse, int64_t rows, K&& k, V&& v,
                            Limit&& limit, int64_t begin, int64_t end, int64_t head_dim,
                            float scale, float* dk, float* dv, DQ&& dq, float* scratch) {
  const int64_t width = round_up(head_dim, Vec::size), depth = words_of<T>(head_dim);
  const int64_t k_row = round_up(depth, Vec::size), lanes = round_up(rows, Vec::size);
  constexpr int64_t kRowWords = kBwdRows / Operand<T>::per;
  constexpr int64_t kKeyWords = kKeyBlock / Operand<T>::per;
  auto take = [&](int64_t floats) {
    float* taken = scratch;
    scratch += floats;
    return taken;
  };
  auto words = [&](int64_t floats) { return reinterpret_cast<Word<T>*>(take(floats)); };
  Word<T>* q_columns = words(kBwdRows * width);
  Word<T>* q_stacked = words(kBwdRows * width);
  Word<T>* dout_columns = words(kBwdRows * width);
  Word<T>* dout_stacked = words(kBwdRows * width);
  Word<T>* keys = words(kKeyBlock * width);
  Word<T>* values = words(kKeyBlock * width);
  Word<T>* keys_stacked = words(kKeyBlock * width);
  Word<T>* keys_turned = words(kKeyBlock * width);
  float* dq_turned = take(kBwdRows * width);
  float* dq_rows = take(kBwdRows * width);
  float* statistic = take(kBwdRows);
  float* delta = take(kBwdRows);
  float* scores = take(kBwdRows * kKeyBlock);
  float* slopes = take(kBwdRows * kKeyBlock);
  Word<T>* p = words(kBwdRows * kKeyBlock);
  Word<T>* ds = words(kBwdRows * kKeyBlock);
  Word<T>* ds_stacked = words(kBwdRows * kKeyBlock);

  pack_columns<T>(q, rows, head_dim, q_columns, kBwdRows);
  pack_columns<T>(dout, rows, head_dim, dout_columns, kBwdRows);
  pack_stacked<T>(q, rows, head_dim, q_stacked, width);
  pack_stacked<T>(dout, rows, head_dim, dout_stacked, width);
  for (int64_t r = 0; r < lanes; ++r) {
    // Rows that see nothing, and those that aren't there, weigh nothing.
    statistic[r] = r < rows && limit(r) > 0 ? lse(r) : -kNothing;
    float sums[1] = {0.0f};
    if (r < rows)
      sweep_sums(head_dim, sums, [&](int64_t d, auto part, Vec* acc) {
        acc[0] = fma(load(dout(r) + d, part), load(o(r) + d, part), acc[0]);
      });
    delta[r] = sums[0];
  }
  std::fill(dq_turned, dq_turned + kBwdRows * width, 0.0f);

  end = std::min(end, limit(rows - 1));
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int64_t seen = std::min(kKeyBlock, end - first);
    pack_rows<T>([&](int64_t j) { return k(first + j); }, seen, head_dim, keys, k_row);
    pack_rows<T>([&](int64_t j) { return v(first + j); }, seen, head_dim, values, k_row);
    pack_stacked<T>([&](int64_t j) { return k(first + j); }, seen, head_dim, keys_stacked, width);
    pack_columns<float>(
        [&](int64_t j) { return reinterpret_cast<const float*>(keys_stacked) + j * width; },
        words_of<T>(seen), width, reinterpret_cast<float*>(keys_turned), kKeyWords);

    product(keys, k_row, q_columns, kBwdRows, scores, kBwdRows, seen, lanes, depth, false);
    product(values, k_row, dout_columns, kBwdRows, slopes, kBwdRows, seen, lanes, depth, false);
    int64_t unseeing = 0;  // how many of the first rows don't see key j
    for (int64_t j = 0; j < seen; ++j) {
      while (limit(unseeing) <= first + j) ++unseeing;
      float* row = scores + j * kBwdRows;
      std::fill(row, row + unseeing, kNothing);
      softmax_bwd<T>(row, slopes + j * kBwdRows, statistic, delta, scale * kLog2e,
                     p + j * kRowWords, ds + j * kRowWords, lanes);
    }
    const Word<T>* across = ds;
    if constexpr (Operand<T>::per == 2) {
      for (int64_t j = 0; j < seen; j += 2)
        stack_keys<T>(slopes + j * kBwdRows, j + 1 < seen ? slopes + (j + 1) * kBwdRows : nullptr,
                      ds_stacked + j / 2 * kBwdRows, lanes);
      across = ds_stacked;
    }
    product(p, kRowWords, dout_stacked, width, dv + (first - begin) * width, width, seen, width,
            words_of<T>(rows), true);
    product(ds, kRowWords, q_stacked, width, dk + (first - begin) * width, width, seen, width,
            words_of<T>(rows), true);
    product(keys_turned, kKeyWords, across, kBwdRows, dq_turned, kBwdRows, head_dim, lanes,
            words_of<T>(seen), true);
  }
  pack_columns<float>([&](int64_t d) { return dq_turned + d * kBwdRows; }, head_dim, rows, dq_rows,
                      width);
  for (int64_t r = 0; r < rows; ++r) dq(r, dq_rows + r * width);
}

// The same for few_rows, which are all that the chunk's head has: one pass over its keys and
// values, and their gradients are written at once, to dk(j) and dv(j).
template <class T, class Q, class O, class DO, class Lse, class K, class V, class Limit, class DK,
          class DV, class DQ>
inline void attend_few_bwd(Q&& q, O&& o, DO&& dout, Lse&& lse, int64_t rows, K&& k, V&& v,
                           Limit&& limit, int64_t begin, int64_t end, int64_t head_dim, float scale,
                           DK&& dk, DV&& dv, DQ&& dq, float* scratch) {
  float *queries = scratch, *douts = queries + kTileRows * head_dim;
  float* total = douts + kTileRows * head_dim;
  float* p = total + kTileRows * head_dim;
  float* ds = p + kTileRows * kKeyBlock;
  pack_rows<T>(q, rows, head_dim, queries, head_dim);
  pack_rows<T>(dout, rows, head_dim, douts, head_dim);
  std::fill(total, total + rows * head_dim, 0.0f);
  float delta[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    float sums[1] = {0.0f};
    sweep_sums(head_dim, sums, [&](int64_t d, auto part, Vec* acc) {
      acc[0] = fma(load(dout(r) + d, part), load(o(r) + d, part), acc[0]);
    });
    delta[r] = sums[0];
  }
  // The gradient of one key or value: the rows, each by its weight.
  const auto blend = [&](const float* weights, const float* row, float c, T* to) {
    for (int64_t d = 0; d < head_dim; d += Vec::size) {
      Vec acc = vec(0.0f);
      for (int64_t r = 0; r < rows; ++r)
        acc = fma(vec(weights[r * kKeyBlock]), load(row + r * head_dim + d, Full{}), acc);
      store(to + d, acc * vec(c), Full{});
    }
  };
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int64_t seen = std::min(kKeyBlock, end - first), count = round_up(seen, Vec::size);
    for (int64_t j = first + kKeyBlock; j < std::min(first + 2 * kKeyBlock, end); ++j) {
      prefetch(k(j), head_dim);
      prefetch(v(j), head_dim);
    }
    const auto key = [&](int64_t j) { return k(first + j); };
    few_scores<T>(queries, head_dim, key, p, rows, seen, head_dim);
    few_scores<T>(
        douts, head_dim, [&](int64_t j) { return v(first + j); }, ds, rows, seen, head_dim);
    for (int64_t r = 0; r < rows; ++r) {
      float *weights = p + r * kKeyBlock, *slopes = ds + r * kKeyBlock;
      const int64_t own = std::clamp<int64_t>(limit(r) - first, 0, seen);
      std::fill(weights + own, weights + count, kNothing);
      std::fill(slopes + own, slopes + count, 0.0f);
      const Vec shift = vec(own > 0 ? lse(r) : 0.0f);
      for (int64_t j = 0; j < count; j += Vec::size) {
        const Vec weight =
            exp2_of(load(weights + j, Full{}) * vec(scale * kLog2e) - shift, float{});
        store(weights + j, weight, Full{});
        store(slopes + j, weight * (load(slopes + j, Full{}) - vec(delta[r])), Full{});
      }
    }
    few_totals<T>(ds, key, total, head_dim, rows, seen);
    for (int64_t j = 0; j < seen; ++j) {
      blend(ds + j, queries, scale, dk(first + j));
      blend(p + j, douts, 1.0f, dv(first + j));
    }
  }
  for (int64_t r = 0; r < rows; ++r) dq(r, total + r * head_dim);
}
