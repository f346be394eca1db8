// A bfloat16 weight times 2 to 8 rows of bfloat16 activations, by tiles: some rows of the weight
// for up to 4 of the activations, whose sums are half of the registers and more.
//
// A row of the weight at a time loads a vector of activations for each product: of 8 rows of 2048
// that alone is what the first-level cache holds. A tile of 3 by 4 loads 7 vectors for 12 products.
// The order of a row's sum is that of _stream.cpp, and so are its bits.
#pragma once

#include "cpu/weights/activations.h"

#if defined(__AVX512BF16__)

constexpr int kTileBatch = 4;

#define UNROLL_TILE _Pragma("GCC unroll 8")

// What comes next in memory, a few cache lines at every step: the rows of a tile lie apart, so that
// the processor doesn't see the one stream that they are.
struct NextLines {
  const uint8_t* at;
  int lines;  // a step

  void step() {
    for (int i = 0; i < lines; ++i, at += 64)
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

// out[b * stride + r] = row r of `rows`, which are row_bytes apart, times activation b.
template <int Rows, int Batch>
[[gnu::noinline]] void tile(const uint8_t* rows, int64_t row_bytes, int64_t k, const Activation* x,
                            float* out, int64_t stride, NextLines& ahead) {
  constexpr int64_t step = 2 * Bf16Pairs::size;
  Vec even[Rows][Batch], odd[Rows][Batch];
  UNROLL_TILE for (int r = 0; r < Rows; ++r)
    UNROLL_TILE for (int b = 0; b < Batch; ++b) even[r][b] = odd[r][b] = vec(0.0f);
  const auto add = [&](int64_t c, auto part, Vec (&sums)[Rows][Batch])
                       __attribute__((always_inline)) {
    Bf16Pairs weights[Rows];
    UNROLL_TILE for (int r = 0; r < Rows; ++r) weights[r] =
        load_pairs(rows + r * row_bytes + 2 * c, part);
    UNROLL_TILE for (int b = 0; b < Batch; ++b) {
      const Bf16Pairs values = load_pairs(reinterpret_cast<const bf16*>(x[b].values) + c, Full{});
      UNROLL_TILE for (int r = 0; r < Rows; ++r) sums[r][b] = dot(weights[r], values, sums[r][b]);
    }
  };
  int64_t c = 0;
  for (; c + step <= k; c += step) {
    ahead.step();
    add(c, Full{}, even);
    add(c + Bf16Pairs::size, Full{}, odd);
  }
  if (c < k) {
    const int64_t left = k - c, more = std::max<int64_t>(0, left - Bf16Pairs::size);
    add(c, Tail{left - more}, even);
    add(c + Bf16Pairs::size, Tail{more}, odd);
  }
  UNROLL_TILE for (int r = 0; r < Rows; ++r)
    UNROLL_TILE for (int b = 0; b < Batch; ++b) out[b * stride + r] =
        sum(even[r][b] + odd[r][b]);
}

// Tiles of the first `First` activations, then of the `Second` others.
template <int First, int Second>
void stream_tiles(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                  int64_t stride) {
  constexpr int rows = First == kTileBatch ? 3 : 4, lines = 2 * rows / (Second ? 2 : 1);
  int64_t r = begin;
  const auto both = [&](auto count, NextLines ahead) {
    tile<count(), First>(w.row(r), w.row_bytes, w.k, x, out + r - begin, stride, ahead);
    if constexpr (Second > 0)
      tile<count(), Second>(w.row(r), w.row_bytes, w.k, x + First,
                            out + First * stride + r - begin, stride, ahead);
    r += count();
  };
  while (r + rows <= end)
    both(std::integral_constant<int, rows>{}, {w.row(r + rows), lines});
  while (r < end) both(std::integral_constant<int, 1>{}, {nullptr, 0});
}

// out[b * stride + r - begin] for 2 to 8 activations b.
inline void stream_tiled(const Weight& w, int batch, const Activation* x, int64_t begin,
                         int64_t end, float* out, int64_t stride) {
  switch (batch) {
    case 2: return stream_tiles<2, 0>(w, x, begin, end, out, stride);
    case 3: return stream_tiles<3, 0>(w, x, begin, end, out, stride);
    case 4: return stream_tiles<4, 0>(w, x, begin, end, out, stride);
    case 5: return stream_tiles<3, 2>(w, x, begin, end, out, stride);
    case 6: return stream_tiles<3, 3>(w, x, begin, end, out, stride);
    case 7: return stream_tiles<4, 3>(w, x, begin, end, out, stride);
    default: return stream_tiles<4, 4>(w, x, begin, end, out, stride);
  }
}

#undef UNROLL_TILE

#endif
