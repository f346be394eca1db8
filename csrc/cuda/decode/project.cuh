// A projection of a few rows of inputs, as one phase of decode_step: the inputs, normalised where a
// norm comes first, go to shared memory, the block's rows of the weight stream past them, and what
// becomes of the sums is the phase's own.
#pragma once

#include <type_traits>

#include "decode_weight.cuh"

namespace decode {

// One launch: everything in it is the same for all blocks.
template <class T>
struct Step {
  const int64_t* table;  // [layers + 1, kLayerFields]
  const int64_t *tokens, *positions;
  T* arena;
  const float* rope_table;
  T* logits;
  int64_t* chosen;  // null, or where the likeliest tokens go; it may be `tokens`
  uint8_t* scratch;
  Scratch at;
  int64_t rope_length, max_length, dim, head_dim, qkv_width, ffn_dim, vocab_size;
  int layers, batch, grid;
  bool gated;
  float eps;
  int64_t offsets[kMaxLayers][2];  // of keys and values, in elements of the arena

  DECODE_DEVICE const int64_t* fields(int layer) const { return table + layer * kLayerFields; }
  DECODE_DEVICE T* hidden() const { return reinterpret_cast<T*>(scratch + at.hidden); }
  DECODE_DEVICE T* qkv() const { return reinterpret_cast<T*>(scratch + at.qkv); }
  DECODE_DEVICE T* attended() const { return reinterpret_cast<T*>(scratch + at.attended); }
  DECODE_DEVICE T* activated() const { return reinterpret_cast<T*>(scratch + at.gated); }
  DECODE_DEVICE float* partials() const { return reinterpret_cast<float*>(scratch + at.partials); }
  DECODE_DEVICE uint32_t* finished() const {
    return reinterpret_cast<uint32_t*>(scratch + at.finished);
  }
  DECODE_DEVICE uint32_t* ranked() const {
    return reinterpret_cast<uint32_t*>(scratch + at.ranked);
  }
  DECODE_DEVICE uint64_t* ranks() const { return reinterpret_cast<uint64_t*>(scratch + at.ranks); }
  // Outside of the vocabulary, the rotary table or the cache a row's logits are NaN, and nothing is
  // written to its cache: nobody waits for the device to learn of it.
  DECODE_DEVICE bool in_range(int row) const {
    const int64_t token = tokens[row], position = positions[row];
    return token >= 0 && token < weight_at(fields(layers)).n && position >= 0 &&
           position < smallest(rope_length, max_length);
  }
};

// A projection phase: its weight, its inputs (hidden numbers through a norm, or rows of scratch)
// and its output.
template <class T>
struct Task {
  Weight weight;
  const T* norm;  // null: inputs are taken as they are
  const T* inputs;
  int64_t inputs_stride;
  T* out;
  int64_t out_stride, outputs;
  int grid;
  bool paired, added,
      activated;  // the gate's rows and its values' rows; a residual; SwiGLU or SiLU

  DECODE_DEVICE Rows round(int block, int64_t from) const {
    return round_of(rows_of(outputs, paired, block, grid), from);
  }
};

template <class T>
DECODE_DEVICE Task<T> task_of(const Step<T>& s, Phase phase, int layer) {
  const int64_t* f = s.fields(layer);
  const int64_t* rest = f + 4 * kWeightFields;
  const auto norm = [](int64_t field) { return reinterpret_cast<const T*>(field); };
  Task<T> t{};
  t.inputs = s.hidden();
  t.inputs_stride = t.out_stride = s.dim;
  t.out = s.hidden();
  switch (phase) {
    case Phase::Qkv:
      t.weight = weight_at(f);
      t.norm = norm(rest[0]);
      t.out = s.qkv();
      t.out_stride = s.qkv_width;
      break;
    case Phase::Out:
      t.weight = weight_at(f + kWeightFields);
      t.inputs = s.attended();
      t.inputs_stride = s.qkv_width;
      t.added = true;
      break;
    case Phase::Up:
      t.weight = weight_at(f + 2 * kWeightFields);
      t.norm = norm(rest[3]);
      t.out = s.activated();
      t.out_stride = s.ffn_dim;
      t.paired = s.gated;
      t.activated = true;
      break;
    case Phase::Down:
      t.weight = weight_at(f + 3 * kWeightFields);
      t.inputs = s.activated();
      t.inputs_stride = s.ffn_dim;
      t.added = true;
      break;
    default:
      t.weight = weight_at(f + kWeightFields);
      t.norm = norm(rest[0]);
      t.out = s.logits;
      t.out_stride = s.vocab_size;
  }
  t.grid = s.grid;
  t.outputs = t.paired ? t.weight.n / 2 : t.weight.n;
  return t;
}

// What a block has in shared memory during a projection of at most B rows.
template <class T, int B>
struct Desk {
  Task<T>* task;
  float *sums, *edges, *squares;  // [kRound, B], [kWarps, 2, B], [B, kWarps]
  uint32_t* exponents;            // [16], shifted to their place in a float
  T* inputs;                      // [B, stride()]

  DECODE_DEVICE int stride() const { return static_cast<int>(round_up(task->weight.k, kPadding)); }

  DECODE_DEVICE explicit Desk(uint8_t* shared) {
    static_assert(sizeof(Task<T>) <= kTaskBytes);
    task = reinterpret_cast<Task<T>*>(shared);
    sums = reinterpret_cast<float*>(shared + kTaskBytes);
    edges = sums + kRound * B;
    squares = edges + kWarps * 2 * B;
    exponents = reinterpret_cast<uint32_t*>(squares + kWarps * B);
    inputs = reinterpret_cast<T*>(exponents + 16);
  }
};

// Inputs of rows [first, first + rows) into shared memory, zeros behind them.
template <int B, class T>
DECODE_CALL void place_inputs(Block block, const Step<T>& s, int first, int rows) {
  const Desk<T, B> desk(block.shared());
  const Task<T>& t = *desk.task;
  const int k = static_cast<int>(t.weight.k), stride = desk.stride();
  block.warps([&](Warp warp) {
    for (int b = 0; b < rows; ++b) {
      const T* from = t.inputs + (first + b) * t.inputs_stride;
      T* to = desk.inputs + b * stride;
      PerLane<Floats<1>> squares;
      warp.each([&](int lane) {
        float sum = 0.0f;
#pragma unroll 4
        for (int c = warp.index * kLanes + lane; c < stride; c += kBlock) {
          const T x = c < k ? fresh(from + c) : narrow<T>(0.0f);
          to[input_place<T>(c)] = x;
          sum += wide(x) * wide(x);
        }
        squares[lane].v[0] = sum;
      });
      if (t.norm == nullptr) continue;
      warp.template sum<kLanes>(squares);
      warp.each([&](int lane) {
        if (lane == 0) desk.squares[b * kWarps + warp.index] = squares[lane].v[0];
      });
    }
    if (t.weight.form == Form::Packed && warp.index == 0)
      warp.each([&](int lane) {
        if (lane < 16) desk.exponents[lane] = static_cast<uint32_t>(t.weight.exponents[lane]) << 23;
      });
  });
  if (t.norm == nullptr) return;
  block.threads([&](int thread) {
    for (int b = 0; b < rows; ++b) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += desk.squares[b * kWarps + i];
      const float rstd = 1.0f / sqrtf(sum / static_cast<float>(k) + s.eps);
      T* row = desk.inputs + b * stride;
      for (int c = thread; c < k; c += kBlock) {
        T& x = row[input_place<T>(c)];
        x = narrow<T>(rounded<T>(wide(x) * rstd) * wide(t.norm[c]));
      }
    }
  });
}

// The units of a round of rows, one after the other: where a warp is in them.
struct Cursor {
  int row, unit;  // local row
  DECODE_DEVICE void step(int units) {
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
DECODE_DEVICE void add_products(const Chunk<F>& chunk, const uint32_t* exponents, const T* x,
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
DECODE_CALL void stream(Block block, Warp warp, int64_t from) {
  const Desk<T, B> desk(block.shared());
  const Weight& w = desk.task->weight;
  const Rows rows = desk.task->round(block.index, from);
  constexpr int depth = Chunk<F>::depth;
  const int units = static_cast<int>(units_of(w)), k = static_cast<int>(w.k);
  const int stride = desk.stride();
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
          add_products(lanes[lane].now[j], desk.exponents, desk.inputs, stride, column,
                       lanes[lane].sums);
      });
      if (at.unit == units - 1 || u + j == last - 1) {
        PerLane<Floats<B>> sums;
        warp.each([&](int lane) { sums[lane] = lanes[lane].sums; });
        warp.template sum<kLanes>(sums);
        const int edge = edge_of(at.row, units, mine);
        float* to = edge < 0 ? desk.sums + at.row * B : desk.edges + (warp.index * 2 + edge) * B;
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

// The sum of local row i: a warp's own, or those of its pieces in the order of their columns; and
// the escapes of a packed row, about one row in six of normally distributed weights having any.
template <int B, class T>
DECODE_DEVICE float sum_of(const Desk<T, B>& desk, const Rows& rows, int64_t i, int b) {
  const Weight& w = desk.task->weight;
  const int64_t units = units_of(w), all = rows.count() * units;
  const int64_t first = owner(i * units, all, kWarps);
  const int64_t last = owner((i + 1) * units - 1, all, kWarps);
  float sum = 0.0f;
  if (first == last && edge_of(i, units, share(all, first, kWarps)) < 0) {
    sum = desk.sums[i * B + b];
  } else {
    for (int64_t part = first; part <= last; ++part) {
      const Range mine = share(all, part, kWarps);
      if (mine.size() > 0) sum += desk.edges[(part * 2 + edge_of(i, units, mine)) * B + b];
    }
  }
  if (w.form != Form::Packed) return sum;
  const int64_t row = rows.row(i);
  const T* x = desk.inputs + b * desk.stride();
  for (int32_t e = w.escape_starts[row]; e < w.escape_starts[row + 1]; ++e)
    sum = fmaf(element_at(reinterpret_cast<const uint8_t*>(w.escape_values), e, Element::BFloat16),
               wide(x[input_place<T>(w.escape_columns[e])]), sum);
  return sum;
}

// SwiGLU, or SiLU where nothing is gated.
template <class T>
DECODE_DEVICE T activate(float gate, float up, bool gated) {
  const float g = rounded<T>(gate);
  const float silu = rounded<T>(g / (1.0f + expf(-g)));
  return narrow<T>(gated ? silu * rounded<T>(up) : silu);
}

// What becomes of a round's sums, for sequences [first, first + batch).
template <int B, class T>
DECODE_CALL void finish(Block block, int64_t from, int first, int batch) {
  const Desk<T, B> desk(block.shared());
  const Task<T>& t = *desk.task;
  const Rows rows = t.round(block.index, from);
  block.threads([&](int thread) {
    const int n = static_cast<int>(rows.outputs.size());
    for (int i = thread; i < n * batch; i += kBlock) {
      const int output = i % n, b = i / n;
      const float sum = sum_of(desk, rows, output, b);
      T* to = t.out + (first + b) * t.out_stride + rows.outputs.first + output;
      if (t.activated) {
        *to = activate<T>(sum, t.paired ? sum_of(desk, rows, n + output, b) : 0.0f, t.paired);
      } else if (t.added) {
        *to = narrow<T>(wide(fresh(to)) + rounded<T>(sum));
      } else {
        *to = narrow<T>(sum);
      }
    }
  });
}

template <int B, class T>
DECODE_DEVICE void stream_form(Block block, Warp warp, int64_t from, Form form) {
  if (form == Form::Affine8) return stream<Form::Affine8, B, T>(block, warp, from);
  if (form == Form::Affine4) return stream<Form::Affine4, B, T>(block, warp, from);
  if constexpr (sizeof(T) == 4) {
    stream<Form::Float, B, T>(block, warp, from);
  } else if constexpr (std::is_same_v<T, fp16>) {
    stream<Form::Half, B, T>(block, warp, from);
  } else if (form == Form::Packed) {
    stream<Form::Packed, B, T>(block, warp, from);
  } else {
    stream<Form::BFloat16, B, T>(block, warp, from);
  }
}

template <class T>
DECODE_CALL void set_task(Block block, const Step<T>& s, Phase phase, int layer) {
  block.threads([&](int thread) {
    if (thread == 0) *reinterpret_cast<Task<T>*>(block.shared()) = task_of(s, phase, layer);
  });
}

template <int B, class T>
DECODE_CALL void project(Block block, const Step<T>& s, Phase phase, int layer) {
  set_task(block, s, phase, layer);
  const Task<T>& t = *reinterpret_cast<const Task<T>*>(block.shared());
  const Range mine = share(t.outputs, block.index, s.grid);
  for (int first = 0; first < s.batch; first += B) {
    const int batch = s.batch - first < B ? s.batch - first : B;
    place_inputs<B>(block, s, first, batch);
    for (int64_t from = mine.first; from < mine.last;) {
      block.warps([&](Warp warp) { stream_form<B, T>(block, warp, from, t.weight.form); });
      finish<B, T>(block, from, first, batch);
      from = t.round(block.index, from).outputs.last;
    }
  }
}

// What each warp will read first of a coming projection, and its norm, on their way to the
// second-level cache: asked for before a barrier, they arrive while it is waited for. Of 270M that
// is all of a projection, and 17 MB on 132 multiprocessors at the most.
constexpr int64_t kAhead = 32;  // units

template <class T>
DECODE_CALL void prefetch_task(Block block, const Step<T>& s, Phase phase, int layer) {
  const Task<T> t = task_of(s, phase, layer);
  const Weight& w = t.weight;
  const Rows all = rows_of(t.outputs, t.paired, block.index, s.grid);
  const Rows rows = round_of(all, all.outputs.first);
  const int64_t units = units_of(w), bytes = row_length(w), unit = unit_bytes(w.form);
  const int64_t lines = unit / kLine;
  block.warps([&](Warp warp) {
    const Range mine = share(rows.count() * units, warp.index, kWarps);
    const int64_t count = smallest(mine.size(), kAhead) * lines;
    warp.each([&](int lane) {
      for (int64_t i = lane; i < count; i += kLanes) {
        const int64_t u = mine.first + i / lines, at = u % units * unit + i % lines * kLine;
        if (at < bytes) prefetch(w.data + rows.row(u / units) * w.row_bytes + at);
      }
      if (w.form == Form::Packed && warp.index < 2 && lane == 0 && rows.count() > 0)
        prefetch(w.escape_starts + rows.row(warp.index * (rows.count() - 1)));
    });
  });
  if (t.norm == nullptr || block.index != 0) return;
  block.threads([&](int thread) {
    const int64_t size = s.dim * static_cast<int64_t>(sizeof(T));
    for (int64_t at = thread * kLine; at < size; at += kBlock * kLine)
      prefetch(reinterpret_cast<const uint8_t*>(t.norm) + at);
  });
}

}  // namespace decode
