// Attention of a tile: softmax(scale q k^T) v by blocks of keys, with the softmax rescaled as its
// maximum grows, so that scores never leave the caches.
//
// 4 n d operations a row over n keys. Of bf16 at head_dim 64 that is 64 pair products for a vector
// of 16 scores, beside some 20 instructions of softmax. Keys and values are gathered once a block
// for all rows of the tile: 2% of the work for 256 rows, half of it for the 4 of one token.
#pragma once

#include <cmath>

#include "cpu/attention/few_rows.h"
#include "cpu/scratch.h"
#include "cpu/simd/exponentials.h"

// The floats of scratch that attend_tile needs, whatever the number of keys. They need no
// alignment, but are faster from a multiple of 64 bytes on.
constexpr int64_t attend_scratch(int64_t rows, int64_t head_dim) {
  const int64_t width = round_up(head_dim, Vec::size);
  const int64_t room = round_up(rows, kStepRows<bf16>);
  return room * (2 * width + Vec::size) + round_up(room, 16) + 2 * kKeyBlock * width +
         2 * kStepRows<bf16> * kKeyBlock;
}

template <class T>
struct AttendScratch {
  int64_t width, depth;     // of a row: floats of whole vectors, lanes along the summed dimension
  Matrix<Lane<T>> queries;  // [rows, depth]
  Matrix<float> total;      // [rows, width], values weighted by unnormalized probabilities
  float *sums, *tops;       // [rows, Vec::size], [rows]: of probabilities, of scores
  Matrix<Lane<T>> keys, values;
  Matrix<float> scores;     // [kStepRows, kKeyBlock]
  Matrix<Lane<T>> weights;  // of the same elements

  AttendScratch(int64_t rows, int64_t head_dim, float* memory)
      : width(round_up(head_dim, Vec::size)), depth(lanes_of<T>(head_dim)) {
    Parts parts{memory};
    rows = round_up(rows, kStepRows<bf16>);  // the last step is a whole one
    queries = {parts.take_as<Lane<T>>(rows * width), round_up(depth, Vec::size)};
    total = {parts.take(rows * width), width};
    sums = parts.take(rows * Vec::size);
    tops = parts.take(round_up(rows, 16));
    keys = {parts.take_as<Lane<T>>(kKeyBlock * width), kKeyBlock};
    values = {parts.take_as<Lane<T>>(kKeyBlock * width), width};
    scores = {parts.take(kStepRows<T> * kKeyBlock), kKeyBlock};
    weights = {parts.take_as<Lane<T>>(kStepRows<T> * kKeyBlock), kKeyBlock / Operand<T>::per};
    std::fill(total.data, total.data + rows * width, 0.0f);
    std::fill(sums, sums + rows * Vec::size, 0.0f);
    std::fill(tops, tops + rows, kNothing);
  }

  // That of the rows from the r-th on.
  AttendScratch from(int64_t r) const {
    AttendScratch rest = *this;
    rest.queries = queries.from(r, 0);
    rest.total = total.from(r, 0);
    rest.sums += r * Vec::size;
    rest.tops += r;
    return rest;
  }
};

// One row of scores, of which it sees the first `seen`, to probabilities 2^(c s - top) in
// p[0, count), zeros for keys that it doesn't see. Adds them to `sum`. Returns whether the maximum
// grew; everything summed before must then shrink by the factor `shrink`.
template <class T>
inline bool softmax_block(float* s, Lane<T>* p, int64_t seen, int64_t count, float c, float& top,
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

// All rows of the tile over the keys [first, first + block).
template <class T>
inline void attend_block(const Tile<T>& tile, const AttendScratch<T>& s, int64_t first,
                         int64_t block, bool few) {
  const SeenRows<const T> keys = tile.k.from(first), values = tile.v.from(first);
  if (!few) {
    gather_columns<T>(keys, block, tile.head_dim, s.keys.data, s.keys.stride);
    gather_stacked<T>(values, block, tile.head_dim, s.values.data, s.values.stride);
  }
  for (int64_t r = 0; r < tile.rows; r += kStepRows<T>) {
    const int64_t rows = std::min(kStepRows<T>, tile.rows - r);
    const int64_t seen = std::min(block, tile.limit(r + rows - 1) - first);
    if (seen <= 0) continue;
    const int64_t count = filled<T>(seen);
    if constexpr (Operand<T>::per == 1)
      if (few)
        few_scores<T>({s.queries.row(r), s.queries.stride}, keys, s.scores.data, rows, seen,
                      tile.head_dim);
    if (!few) product(s.queries.from(r, 0), s.keys, s.scores, rows, count, s.depth, false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t own = std::clamp<int64_t>(tile.limit(r + i) - first, 0, seen);
      Vec shrink;
      float* row = s.total.row(r + i);
      if (softmax_block<T>(s.scores.row(i), s.weights.row(i), own, count, tile.scale * kLog2e,
                           s.tops[r + i], s.sums + (r + i) * Vec::size, shrink))
        for (int64_t d = 0; d < s.width; d += Vec::size)
          store(row + d, load(row + d, Full{}) * shrink, Full{});
    }
    if constexpr (Operand<T>::per == 1)
      if (few) few_totals<T>(s.weights.data, values, s.total.from(r, 0), rows, seen);
    if (!few)
      product(s.weights, s.values, s.total.from(r, 0), rows, s.width, lanes_of<T>(seen), true);
  }
}

// Of few rows, whose heads lie apart: without this the processor sees 16 streams, and prefetches
// none.
template <class T>
inline void prefetch_block(const Tile<T>& tile, int64_t first, int64_t end) {
  for (int64_t j = first; j < std::min(first + kKeyBlock, end); ++j) {
    prefetch(tile.k(j), tile.head_dim);
    prefetch(tile.v(j), tile.head_dim);
  }
}

// What the rows have summed, over the sum of their probabilities. lse: as of attend_tile.
template <class T>
inline void finish_rows(const Tile<T>& tile, const AttendScratch<T>& s, TileRows<T> out,
                        TileRows<float> lse) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float weight = sum(load(s.sums + r * Vec::size, Full{}));
    const bool none = tile.limit(r) <= 0;
    const Vec share = vec(none ? 0.0f : 1.0f / weight);
    T* to = out(r);
    sweep(tile.head_dim, [&](int64_t d, auto part) {
      store(to + d, load(s.total.row(r) + d, part) * share, part);
    });
    if (lse.first != nullptr) *lse(r) = none ? kNothing : s.tops[r] + std::log2(weight);
  }
}

// out: the rows' results. lse: log2 of the sum of 2^(scale log2(e) s) of each row, -inf if it sees
// no key; nobody asks for it if lse.first is null. memory: attend_scratch(rows, head_dim) floats.
template <class T>
inline void attend_tile(const Tile<T>& tile, TileRows<T> out, TileRows<float> lse, float* memory) {
  const Amx amx;
  const AttendScratch<T> s(tile.rows, tile.head_dim, memory);
  gather_rows<T>(tile.q, tile.rows, tile.head_dim, s.queries.data, s.queries.stride);
  const bool few = tile.whole && few_rows<T>(tile.rows, tile.head_dim);
  const int64_t end = tile.limit(tile.rows - 1);
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    if (tile.rows <= 16) prefetch_block(tile, first + kKeyBlock, end);
    attend_block(tile, s, first, std::min(kKeyBlock, end - first), few);
  }
  finish_rows(tile, s, out, lse);
}

// The rows of each token as attend_tile would have them alone, bit for bit. Blocks of keys that all
// tokens see are gathered once for them. From the first new token's block on each token has what it
// sees itself: a later token's value times a probability of 0 is a NaN if it isn't finite.
template <class T>
inline void attend_tokens(const Tile<T>& tile, TileRows<T> out, float* memory) {
  const Amx amx;
  const AttendScratch<T> s(tile.rows, tile.head_dim, memory);
  gather_rows<T>(tile.q, tile.rows, tile.head_dim, s.queries.data, s.queries.stride);
  const int64_t group = tile.limit.group, end = tile.limit(tile.rows - 1);
  const int64_t common = tile.limit(0) / kKeyBlock * kKeyBlock;
  const bool few = few_rows<T>(group, tile.head_dim);
  for (int64_t first = 0; first < common; first += kKeyBlock) {
    prefetch_block(tile, first + kKeyBlock, end);
    attend_block(tile, s, first, kKeyBlock, few);
  }
  for (int64_t r = 0; r < tile.rows; r += group) {
    Tile<T> own = tile;
    own.rows = group;
    own.limit = {tile.limit.before + r / group, group, nullptr};
    for (int64_t first = common, last = tile.limit(r); first < last; first += kKeyBlock)
      attend_block(own, s.from(r), first, std::min(kKeyBlock, last - first), few);
  }
  finish_rows(tile, s, out, {nullptr, group, 0, 0});
}
