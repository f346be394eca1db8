// The backward of attend.h, for a tile of queries and the keys of one chunk. With P = softmax:
//   dV = P^T dO,  dS = P (dO V^T - delta),  delta = rowsum(dO O),  dK = scale dS^T Q,
//   dQ = scale dS K.
// P is computed again from the saved lse, transposed: a vector holds one key's scores for 16 rows.
// So no row is ever reduced, K and V are operands as they lie, and P^T and dS^T, rounded, are the
// operands of the products that follow. 10 n d operations a row over n keys.
#pragma once

#include "cpu/attention/attend.h"

constexpr int64_t kBwdRows = 64;  // the rows of a tile: a panel of the products

// A tile with what arrives from the forward and at its output, for the keys [begin, end) of those
// that are seen.
template <class T>
struct TileBwd {
  Tile<T> tile;
  TileRows<const T> out, dout;
  TileRows<const float> lse;
  int64_t begin, end;

  // sum of dout out over the columns of a row.
  float delta(int64_t r) const {
    float sums[1] = {0.0f};
    sweep_sums(tile.head_dim, sums, [&](int64_t d, auto part, Vec* acc) {
      acc[0] = fma(load(dout(r) + d, part), load(out(r) + d, part), acc[0]);
    });
    return sums[0];
  }
};

// What a tile of queries needs of scratch, beside its chunk's dK and dV [keys, width].
constexpr int64_t attend_bwd_scratch(int64_t head_dim) {
  const int64_t width = round_up(head_dim, Vec::size);
  return (6 * kBwdRows + 4 * kKeyBlock) * width + (2 + 5 * kKeyBlock) * kBwdRows;
}

template <class T>
struct AttendBwdScratch {
  static constexpr int64_t kRowLanes = kBwdRows / Operand<T>::per;
  static constexpr int64_t kKeyLanes = kKeyBlock / Operand<T>::per;
  int64_t width, depth;  // of a row: floats of whole vectors, lanes along the summed dimension
  Matrix<Lane<T>> q_columns, q_stacked, dout_columns, dout_stacked;
  Matrix<Lane<T>> keys, values, keys_stacked, keys_turned;
  Matrix<float> dq_turned, dq_rows;
  float *lse, *delta;            // [kBwdRows]
  Matrix<float> scores, slopes;  // [kKeyBlock, kBwdRows]
  Matrix<Lane<T>> p, ds, ds_stacked;

  AttendBwdScratch(int64_t head_dim, float* memory)
      : width(round_up(head_dim, Vec::size)), depth(lanes_of<T>(head_dim)) {
    Parts parts{memory};
    const auto lanes = [&](int64_t count, int64_t stride) {
      return Matrix<Lane<T>>{parts.take_as<Lane<T>>(count), stride};
    };
    const auto floats = [&](int64_t count, int64_t stride) {
      return Matrix<float>{parts.take(count), stride};
    };
    const int64_t k_row = round_up(depth, Vec::size);
    q_columns = lanes(kBwdRows * width, kBwdRows);
    q_stacked = lanes(kBwdRows * width, width);
    dout_columns = lanes(kBwdRows * width, kBwdRows);
    dout_stacked = lanes(kBwdRows * width, width);
    keys = lanes(kKeyBlock * width, k_row);
    values = lanes(kKeyBlock * width, k_row);
    keys_stacked = lanes(kKeyBlock * width, width);
    keys_turned = lanes(kKeyBlock * width, kKeyLanes);
    dq_turned = floats(kBwdRows * width, kBwdRows);
    dq_rows = floats(kBwdRows * width, width);
    lse = parts.take(kBwdRows);
    delta = parts.take(kBwdRows);
    scores = floats(kBwdRows * kKeyBlock, kBwdRows);
    slopes = floats(kBwdRows * kKeyBlock, kBwdRows);
    p = lanes(kBwdRows * kKeyBlock, kRowLanes);
    ds = lanes(kBwdRows * kKeyBlock, kRowLanes);
    ds_stacked = lanes(kBwdRows * kKeyBlock, kBwdRows);
  }
};

// Scores s and their gradients' dot products dp of one key, to P and dS. p and ds are rows of
// elements along the queries; ds as floats stays in dp.
template <class T>
inline void softmax_bwd(const float* s, float* dp, const AttendBwdScratch<T>& scratch, float c,
                        Lane<T>* p, Lane<T>* ds, int64_t rows) {
  using Stored = std::conditional_t<Operand<T>::per == 2, T, float>;
  const float *lse = scratch.lse, *delta = scratch.delta;
  for (int64_t r = 0; r < rows; r += Vec::size) {
    const Vec weight = exp2_of(load(s + r, Full{}) * vec(c) - load(lse + r, Full{}), T{});
    const Vec slope = weight * (load(dp + r, Full{}) - load(delta + r, Full{}));
    store(reinterpret_cast<Stored*>(p) + r, weight, Full{});
    store(reinterpret_cast<Stored*>(ds) + r, slope, Full{});
    store(dp + r, slope, Full{});
  }
}

// Two keys' rows of dS along the summed dimension of dQ; zeros for a key that isn't there.
template <class T>
inline void stack_keys(const float* low, const float* high, Lane<T>* out, int64_t rows) {
  if constexpr (Operand<T>::per == 2)
    for (int64_t r = 0; r < rows; r += Vec::size) {
      const Vec first = low == nullptr ? vec(0.0f) : load(low + r, Full{});
      const Vec second = high == nullptr ? vec(0.0f) : load(high + r, Full{});
      store(reinterpret_cast<float*>(out) + r, stacked(first, second), Full{});
    }
}

// Queries and their gradients as operands; the rows' statistics.
template <class T>
inline void gather_queries(const TileBwd<T>& b, const AttendBwdScratch<T>& s) {
  const int64_t rows = b.tile.rows, head_dim = b.tile.head_dim;
  gather_columns<T>(b.tile.q, rows, head_dim, s.q_columns.data, s.q_columns.stride);
  gather_columns<T>(b.dout, rows, head_dim, s.dout_columns.data, s.dout_columns.stride);
  gather_stacked<T>(b.tile.q, rows, head_dim, s.q_stacked.data, s.q_stacked.stride);
  gather_stacked<T>(b.dout, rows, head_dim, s.dout_stacked.data, s.dout_stacked.stride);
  for (int64_t r = 0; r < filled<T>(rows); ++r) {
    // Rows that see nothing, and those behind the tile's last one, weigh nothing.
    s.lse[r] = r < rows && b.tile.limit(r) > 0 ? *b.lse(r) : -kNothing;
    s.delta[r] = r < rows ? b.delta(r) : 0.0f;
  }
  std::fill(s.dq_turned.data, s.dq_turned.data + kBwdRows * s.width, 0.0f);
}

// Keys [first, first + count) and their values as operands.
template <class T>
inline void gather_keys(const Tile<T>& tile, const AttendBwdScratch<T>& s, int64_t first,
                        int64_t count) {
  const SeenRows<const T> keys = tile.k.from(first);
  gather_rows<T>(keys, count, tile.head_dim, s.keys.data, s.keys.stride);
  gather_rows<T>(tile.v.from(first), count, tile.head_dim, s.values.data, s.values.stride);
  gather_stacked<T>(keys, count, tile.head_dim, s.keys_stacked.data, s.keys_stacked.stride);
  const auto* stacked = reinterpret_cast<const float*>(s.keys_stacked.data);
  gather_columns<float>(SeenRows<const float>{stacked, s.width, nullptr}, lanes_of<T>(count),
                        s.width, reinterpret_cast<float*>(s.keys_turned.data),
                        s.keys_turned.stride);
}

// P and dS of the keys [first, first + count); returns dS with the keys as the summed dimension.
template <class T>
inline Matrix<Lane<T>> weigh_keys(const Tile<T>& tile, const AttendBwdScratch<T>& s, int64_t first,
                                  int64_t count) {
  const int64_t lanes = filled<T>(tile.rows);
  product(s.keys, s.q_columns, s.scores, count, lanes, s.depth, false);
  product(s.values, s.dout_columns, s.slopes, count, lanes, s.depth, false);
  int64_t unseeing = 0;  // how many of the first rows don't see key j
  for (int64_t j = 0; j < count; ++j) {
    while (tile.limit(unseeing) <= first + j) ++unseeing;
    float* row = s.scores.row(j);
    std::fill(row, row + unseeing, kNothing);
    softmax_bwd<T>(row, s.slopes.row(j), s, tile.scale * kLog2e, s.p.row(j), s.ds.row(j), lanes);
  }
  if constexpr (Operand<T>::per == 1) return {s.ds.data, kBwdRows};
  if constexpr (Operand<T>::tiled)
    for (int64_t j = count; j < round_up(count, kAmxRows); ++j) {  // nothing for dK and dV
      std::memset(s.p.row(j), 0, lanes * sizeof(T));
      std::memset(s.ds.row(j), 0, lanes * sizeof(T));
    }
  const auto row = [&](int64_t j) { return j < count ? s.slopes.row(j) : nullptr; };
  for (int64_t j = 0; j < 2 * lanes_of<T>(count); j += 2)
    stack_keys<T>(row(j), row(j + 1), s.ds_stacked.row(j / 2), lanes);
  return s.ds_stacked;
}

// Adds to dk and dv, float [end - begin, width], dk without its scale; AMX adds zeros up to 15 rows
// behind the last one that is seen. Gives dq(r, row), float
// without its scale, of the chunk's keys.
template <class T, class DQ>
inline void attend_tile_bwd(const TileBwd<T>& b, float* dk, float* dv, DQ&& dq, float* memory) {
  const Tile<T>& tile = b.tile;
  const Amx amx;
  const AttendBwdScratch<T> s(tile.head_dim, memory);
  const int64_t lanes = filled<T>(tile.rows), depth = lanes_of<T>(tile.rows);
  gather_queries(b, s);
  const int64_t end = std::min(b.end, tile.limit(tile.rows - 1));
  for (int64_t first = b.begin; first < end; first += kKeyBlock) {
    const int64_t seen = std::min(kKeyBlock, end - first), at = first - b.begin;
    gather_keys(tile, s, first, seen);
    const Matrix<Lane<T>> ds_across = weigh_keys(tile, s, first, seen);
    const Matrix<float> dkeys{dk + at * s.width, s.width}, dvalues{dv + at * s.width, s.width};
    product(s.p, s.dout_stacked, dvalues, seen, s.width, depth, true);
    product(s.ds, s.q_stacked, dkeys, seen, s.width, depth, true);
    product(s.keys_turned, ds_across, s.dq_turned, tile.head_dim, lanes, lanes_of<T>(seen), true);
  }
  gather_columns<float>(SeenRows<const float>{s.dq_turned.data, kBwdRows, nullptr}, tile.head_dim,
                        tile.rows, s.dq_rows.data, s.dq_rows.stride);
  for (int64_t r = 0; r < tile.rows; ++r) dq(r, s.dq_rows.row(r));
}
