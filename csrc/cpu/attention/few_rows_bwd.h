// The backward of attention for few_rows, which are all that the chunk's head has: one pass over
// its keys and values, whose gradients are written at once.
#pragma once

#include "cpu/attention/attend_bwd.h"

template <class T>
struct FewRowsBwd {
  const TileBwd<T>& b;
  float *queries, *douts, *total;  // [rows, head_dim]; the last is dq without its scale
  float *p, *ds;                   // [rows, kKeyBlock]
  float delta[kTileRows];

  FewRowsBwd(const TileBwd<T>& b, float* memory) : b(b) {
    const int64_t rows = b.tile.rows, head_dim = b.tile.head_dim;
    Parts parts{memory};
    queries = parts.take(kTileRows * head_dim);
    douts = parts.take(kTileRows * head_dim);
    total = parts.take(kTileRows * head_dim);
    p = parts.take(kTileRows * kKeyBlock);
    ds = parts.take(kTileRows * kKeyBlock);
    gather_rows<T>(b.tile.q, rows, head_dim, queries, head_dim);
    gather_rows<T>(b.dout, rows, head_dim, douts, head_dim);
    std::fill(total, total + rows * head_dim, 0.0f);
    for (int64_t r = 0; r < rows; ++r) delta[r] = b.delta(r);
  }

  // P and dS of `seen` keys from `first` on, zeros up to a whole vector.
  void weigh(int64_t first, int64_t seen) {
    const Tile<T>& tile = b.tile;
    const int64_t count = round_up(seen, Vec::size);
    const SeenRows<const T> keys = tile.k.from(first);
    few_scores<T>({queries, tile.head_dim}, keys, p, tile.rows, seen, tile.head_dim);
    few_scores<T>({douts, tile.head_dim}, tile.v.from(first), ds, tile.rows, seen, tile.head_dim);
    for (int64_t r = 0; r < tile.rows; ++r) {
      float *weights = p + r * kKeyBlock, *slopes = ds + r * kKeyBlock;
      const int64_t own = std::clamp<int64_t>(tile.limit(r) - first, 0, seen);
      std::fill(weights + own, weights + count, kNothing);
      std::fill(slopes + own, slopes + count, 0.0f);
      const Vec shift = vec(own > 0 ? *b.lse(r) : 0.0f);
      for (int64_t j = 0; j < count; j += Vec::size) {
        const Vec weight =
            exp2_of(load(weights + j, Full{}) * vec(tile.scale * kLog2e) - shift, float{});
        store(weights + j, weight, Full{});
        store(slopes + j, weight * (load(slopes + j, Full{}) - vec(delta[r])), Full{});
      }
    }
    few_totals<T>(ds, keys, {total, tile.head_dim}, tile.rows, seen);
  }

  // The gradient of one key or value: c times the rows of x, each by its weight.
  void blend(const float* weights, const float* x, float c, T* to) const {
    const int64_t rows = b.tile.rows, head_dim = b.tile.head_dim;
    for (int64_t d = 0; d < head_dim; d += Vec::size) {
      Vec acc = vec(0.0f);
      for (int64_t r = 0; r < rows; ++r)
        acc = fma(vec(weights[r * kKeyBlock]), load(x + r * head_dim + d, Full{}), acc);
      store(to + d, acc * vec(c), Full{});
    }
  }
};

// Writes dk(j) and dv(j) of the chunk's keys. Gives dq(r, row), float without its scale.
template <class T, class DQ>
inline void attend_few_bwd(const TileBwd<T>& b, SeenRows<T> dk, SeenRows<T> dv, DQ&& dq,
                           float* memory) {
  const Tile<T>& tile = b.tile;
  FewRowsBwd<T> few(b, memory);
  for (int64_t first = b.begin; first < b.end; first += kKeyBlock) {
    const int64_t seen = std::min(kKeyBlock, b.end - first);
    for (int64_t j = first + kKeyBlock; j < std::min(first + 2 * kKeyBlock, b.end); ++j) {
      prefetch(tile.k(j), tile.head_dim);
      prefetch(tile.v(j), tile.head_dim);
    }
    few.weigh(first, seen);
    for (int64_t j = 0; j < seen; ++j) {
      few.blend(few.ds + j, few.queries, tile.scale, dk(first + j));
      few.blend(few.p + j, few.douts, 1.0f, dv(first + j));
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) dq(r, few.total + r * tile.head_dim);
}
