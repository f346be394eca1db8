// The rows of a weight stream past a few rows of inputs in shared memory. Sums are left there too.
#pragma once

#include <type_traits>

#include "cuda/decode/step.cuh"
#include "cuda/decode/weight.cuh"

namespace decode {

// What a block has in shared memory during a projection of at most B rows.
template <class T, int B>
struct ProjectShared {
  Task<T>* task;
  float *sums, *edges, *squares;  // [kRound, B], [kWarps, 2, B], [B, kWarps]
  uint32_t* exponents;            // [16], shifted to their place in a float
  T* inputs;                      // [B, stride()]

  DEVICE_INLINE int stride() const { return static_cast<int>(round_up(task->weight.k, kPadding)); }

  DEVICE_INLINE explicit ProjectShared(uint8_t* shared) {
    static_assert(sizeof(Task<T>) <= kTaskBytes);
    task = reinterpret_cast<Task<T>*>(shared);
    sums = reinterpret_cast<float*>(shared + kTaskBytes);
    edges = sums + kRound * B;
    squares = edges + kWarps * 2 * B;
    exponents = reinterpret_cast<uint32_t*>(squares + kWarps * B);
    inputs = reinterpret_cast<T*>(exponents + 16);
  }
};

// The units of a round of rows, one after the other: where a warp is in them.
struct Cursor {
  int row, unit;  // local row
  DEVICE_INLINE void step(int units) {
    if (++unit == units) {
      unit = 0;
      ++row;
    }
  }
};

template <Form F, int B>
struct Lane {
  Chunk<F> now[Chunk<F>::depth], next[Chunk<F>::depth];
  Floats<B> sums;
};

// The products of a chunk with its columns of each input; `stride` is between inputs.
template <Form F, int B, class T>
DEVICE_INLINE void add_products(const Chunk<F>& chunk, const uint32_t* exponents, const T* x,
                                int stride, int column, Floats<B>& sums) {
  using C = Chunk<F>;
#pragma unroll
  for (int r = 0; r < C::runs; ++r) {
    float weights[C::run];
    unpack<F>(chunk, r, exponents, weights);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      float values[C::run];
      inputs(x + b * stride, column + r * C::run_step, values);
#pragma unroll
      for (int i = 0; i < C::run; ++i) sums.v[b] = fmaf(weights[i], values[i], sums.v[b]);
    }
  }
}

// A warp's share of a round: sums of whole rows, and of the pieces at its two edges.
template <Form F, int B, class T>
DEVICE_CALL void stream(Block block, Warp warp, int64_t from) {
  const ProjectShared<T, B> shared(block.shared());
  const Weight& w = shared.task->weight;
  const BlockRows rows = shared.task->round(block.index, from);
  constexpr int depth = Chunk<F>::depth;
  const int units = static_cast<int>(units_of(w)), k = static_cast<int>(w.k);
  const int stride = shared.stride();
  const Range mine = share(rows.count() * units, warp.index, kWarps);
  const int first = static_cast<int>(mine.first), last = static_cast<int>(mine.last);
  const bool aligned = is_aligned(w);
  Cursor at{first / units, first % units}, ahead = at;
  PerLane<Lane<F, B>> lanes;
  const auto clear = [&](int lane) {
#pragma unroll
    for (int b = 0; b < B; ++b) lanes[lane].sums.v[b] = 0.0f;
  };
  const auto fill = [&](int from) {
#pragma unroll
    for (int j = 0; j < depth; ++j) {
      if (from + j < last) {
        const int64_t row = rows.row(ahead.row);
        warp.each(
            [&](int lane) { load_chunk(lanes[lane].next[j], w, aligned, row, ahead.unit, lane); });
        ahead.step(units);
      }
    }
  };
  warp.each(clear);
  fill(first);
#pragma unroll 1
  for (int u = first; u < last; u += depth) {
    warp.each([&](int lane) {
#pragma unroll
      for (int j = 0; j < depth; ++j) lanes[lane].now[j] = lanes[lane].next[j];
    });
    fill(u + depth);
#pragma unroll
    for (int j = 0; j < depth; ++j) {
      if (u + j >= last) break;
      warp.each([&](int lane) {
        const int column = static_cast<int>(chunk_column(F, at.unit, lane));
        if (column < k)
          add_products(lanes[lane].now[j], shared.exponents, shared.inputs, stride, column,
                       lanes[lane].sums);
      });
      if (at.unit == units - 1 || u + j == last - 1) {
        PerLane<Floats<B>> sums;
        warp.each([&](int lane) { sums[lane] = lanes[lane].sums; });
        warp.template sum<kLanes>(sums);
        const int edge = edge_of(at.row, units, mine);
        float* to =
            edge < 0 ? shared.sums + at.row * B : shared.edges + (warp.index * 2 + edge) * B;
        warp.each([&](int lane) {
#pragma unroll
          for (int b = 0; b < B; ++b)
            if (lane == b) to[b] = sums[lane].v[b];
          clear(lane);
        });
      }
      at.step(units);
    }
  }
}

template <int B, class T>
DEVICE_INLINE void stream_form(Block block, Warp warp, int64_t from, Form form) {
  if (form == Form::Affine8) return stream<Form::Affine8, B, T>(block, warp, from);
  if (form == Form::Affine4) return stream<Form::Affine4, B, T>(block, warp, from);
  if constexpr (sizeof(T) == 4) {
    stream<Form::Float, B, T>(block, warp, from);
  } else if constexpr (std::is_same_v<T, fp16>) {
    stream<Form::Half, B, T>(block, warp, from);
  } else if (form == Form::Packed12) {
    stream<Form::Packed12, B, T>(block, warp, from);
  } else {
    stream<Form::BFloat16, B, T>(block, warp, from);
  }
}

}  // namespace decode
