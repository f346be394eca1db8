// A bfloat16 weight times 9 to 64 rows of bfloat16 activations, each byte of it read once: tiles of
// 6 rows of the weight by 4 activations, whose sums are three quarters of the registers.
//
// The rows of a tile stay in the first-level cache while all activations pass, which come from the
// second-level one: 10 loads for 24 products. At 16 activations the products take as long as the
// weight's bytes do, so what comes next in memory is asked for all the while.
#pragma once

#include "cpu/weights/activations.h"
#include "cpu/weights/ahead.h"

#if defined(__AVX512BF16__)

constexpr int kSeveral = 64, kSeveralRows = 6, kSeveralBatch = 4;

#define UNROLL_SEVERAL _Pragma("GCC unroll 32")

// So many cache lines at every step, until there are enough.
struct LinesAhead {
  const uint8_t *at, *end;
  int lines;

  void step() {
    for (int i = 0; i < lines && at < end; ++i, at += 64)
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

// out[b * stride + r] = row r of `rows` times activation b of `x`, row_bytes and x_bytes apart.
template <int Rows, int Batch>
[[gnu::noinline]] void several_tile(const uint8_t* rows, int64_t row_bytes, int64_t k,
                                    const uint8_t* x, int64_t x_bytes, float* out, int64_t stride,
                                    LinesAhead& ahead) {
  Vec sums[Batch][Rows];
  UNROLL_SEVERAL for (int b = 0; b < Batch; ++b)
    UNROLL_SEVERAL for (int r = 0; r < Rows; ++r) sums[b][r] = vec(0.0f);
  const auto add = [&](int64_t c, auto part) __attribute__((always_inline)) {
    Bf16Pairs weights[Rows];
    UNROLL_SEVERAL for (int r = 0; r < Rows; ++r) weights[r] =
        load_pairs(rows + r * row_bytes + 2 * c, part);
    UNROLL_SEVERAL for (int b = 0; b < Batch; ++b) {
      const Bf16Pairs values = load_pairs(x + b * x_bytes + 2 * c, Full{});
      UNROLL_SEVERAL for (int r = 0; r < Rows; ++r) sums[b][r] =
          dot(weights[r], values, sums[b][r]);
    }
  };
  int64_t c = 0;
  for (; c + 2 * Bf16Pairs::size <= k; c += 2 * Bf16Pairs::size) {
    ahead.step();
    add(c, Full{});
    add(c + Bf16Pairs::size, Full{});
  }
  for (; c < k; c += Bf16Pairs::size)
    add(c, Tail{std::min<int64_t>(Bf16Pairs::size, k - c)});
  UNROLL_SEVERAL for (int b = 0; b < Batch; ++b)
    UNROLL_SEVERAL for (int r = 0; r < Rows; ++r) out[b * stride + r] = sum(sums[b][r]);
}

// out[b * stride + r - begin] = row r of w times activation b, for rows [begin, end).
inline void stream_several(const Weight& w, int batch, const Activation* x, int64_t begin,
                           int64_t end, float* out, int64_t stride) {
  // Addresses that are computed take no registers.
  const auto* values = reinterpret_cast<const uint8_t*>(x->values);
  const int64_t x_bytes = (x[1].values - x[0].values) * sizeof(float);
  const int passes = (batch + kSeveralBatch - 1) / kSeveralBatch;
  const auto all = [&](auto rows, int64_t r, LinesAhead ahead) {
    for (int first = 0; first < batch; first += kSeveralBatch) {
      const auto pass = [&](auto count) {
        several_tile<rows(), count()>(w.row(r), w.row_bytes, w.k, values + first * x_bytes, x_bytes,
                                      out + first * stride + r - begin, stride, ahead);
      };
      switch (batch - first) {
        case 1: pass(std::integral_constant<int, 1>{}); break;
        case 2: pass(std::integral_constant<int, 2>{}); break;
        case 3: pass(std::integral_constant<int, 3>{}); break;
        default: pass(std::integral_constant<int, kSeveralBatch>{});
      }
    }
  };
  constexpr int lines = 2 * kSeveralRows;  // of a step of one pass
  int64_t r = begin;
  for (; r + kSeveralRows <= end; r += kSeveralRows) {
    const uint8_t* next = w.row(r) + kDistances.several;
    all(std::integral_constant<int, kSeveralRows>{}, r,
        {next, next + kSeveralRows * w.row_bytes, (lines + passes - 1) / passes});
  }
  for (; r < end; ++r) all(std::integral_constant<int, 1>{}, r, {nullptr, nullptr, 0});
}

#undef UNROLL_SEVERAL

#endif
