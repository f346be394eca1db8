// A projection of a few rows of inputs, as one phase of decode_step: the inputs, normalized if a
// norm comes first, go to shared memory, the block's rows of the weight stream past them, and the
// phase makes its output of the sums.
#pragma once

#include "cuda/decode/stream.cuh"

namespace decode {

// Inputs of sequences [first, first + rows) into shared memory, zeros behind them and in the other
// rows: weights are multiplied with all B.
template <int B, class T>
DEVICE_CALL void place_inputs(Block block, const Step<T>& s, int first, int rows) {
  const ProjectShared<T, B> shared(block.shared());
  const Task<T>& t = *shared.task;
  const int k = static_cast<int>(t.weight.k), stride = shared.stride();
  block.warps([&](Warp warp) {
#pragma unroll 1
    for (int b = 0; b < B; ++b) {
      const T* from = t.inputs + (first + b) * t.inputs_stride;
      const int end = b < rows ? k : 0;
      T* to = shared.inputs + b * stride;
      PerLane<Floats<1>> squares;
      warp.each([&](int lane) {
        float sum = 0.0f;
#pragma unroll 4
        for (int c = warp.index * kLanes + lane; c < stride; c += kBlock) {
          const T x = c < end ? fresh(from + c) : narrow<T>(0.0f);
          to[input_place<T>(c)] = x;
          sum += wide(x) * wide(x);
        }
        squares[lane].v[0] = sum;
      });
      if (t.norm == nullptr || b >= rows) continue;
      warp.template sum<kLanes>(squares);
      warp.each([&](int lane) {
        if (lane == 0) shared.squares[b * kWarps + warp.index] = squares[lane].v[0];
      });
    }
    if (t.weight.form == Form::Packed12 && warp.index == 0)
      warp.each([&](int lane) {
        if (lane < 16)
          shared.exponents[lane] = static_cast<uint32_t>(t.weight.exponents[lane]) << 23;
      });
  });
  if (t.norm == nullptr) return;
  block.threads([&](int thread) {
    for (int b = 0; b < rows; ++b) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += shared.squares[b * kWarps + i];
      const float rstd = 1.0f / sqrtf(sum / static_cast<float>(k) + s.eps);
      T* row = shared.inputs + b * stride;
      for (int c = thread; c < k; c += kBlock) {
        T& x = row[input_place<T>(c)];
        x = narrow<T>(rounded<T>(wide(x) * rstd) * wide(t.norm[c]));
      }
    }
  });
}

// The sum of local row i: a warp's own, or those of its pieces in the order of their columns. Then
// the escapes of a packed12 row: about one row in six of normally distributed weights has any.
template <int B, class T>
DEVICE_INLINE float sum_of(const ProjectShared<T, B>& shared, const BlockRows& rows, int64_t i,
                           int b) {
  const Weight& w = shared.task->weight;
  const int64_t units = units_of(w), all = rows.count() * units;
  const int64_t first = owner(i * units, all, kWarps);
  const int64_t last = owner((i + 1) * units - 1, all, kWarps);
  float sum = 0.0f;
  if (first == last && edge_of(i, units, share(all, first, kWarps)) < 0) {
    sum = shared.sums[i * B + b];
  } else {
    for (int64_t part = first; part <= last; ++part) {
      const Range mine = share(all, part, kWarps);
      if (mine.size() > 0) sum += shared.edges[(part * 2 + edge_of(i, units, mine)) * B + b];
    }
  }
  if (w.form != Form::Packed12) return sum;
  const int64_t row = rows.row(i);
  const T* x = shared.inputs + b * shared.stride();
  for (int32_t e = w.escape_starts[row]; e < w.escape_starts[row + 1]; ++e)
    sum = fmaf(element_at(reinterpret_cast<const uint8_t*>(w.escape_values), e, Element::BFloat16),
               wide(x[input_place<T>(w.escape_columns[e])]), sum);
  return sum;
}

// SwiGLU, or SiLU without a gate.
template <class T>
DEVICE_INLINE T activate(float gate, float up, bool gated) {
  const float g = rounded<T>(gate);
  const float silu = rounded<T>(g / (1.0f + expf(-g)));
  return narrow<T>(gated ? silu * rounded<T>(up) : silu);
}

// A round's sums to outputs, for sequences [first, first + batch).
template <int B, class T>
DEVICE_CALL void finish(Block block, int64_t from, int first, int batch) {
  const ProjectShared<T, B> shared(block.shared());
  const Task<T>& t = *shared.task;
  const BlockRows rows = t.round(block.index, from);
  block.threads([&](int thread) {
    const int n = static_cast<int>(rows.outputs.size());
    for (int i = thread; i < n * batch; i += kBlock) {
      const int output = i % n, b = i / n;
      const float sum = sum_of(shared, rows, output, b);
      T* to = t.out + (first + b) * t.out_stride + rows.outputs.first + output;
      if (t.activated) {
        *to = activate<T>(sum, t.paired ? sum_of(shared, rows, n + output, b) : 0.0f, t.paired);
      } else if (t.added) {
        *to = narrow<T>(wide(fresh(to)) + rounded<T>(sum));
      } else {
        *to = narrow<T>(sum);
      }
    }
  });
}

template <class T>
DEVICE_CALL void set_task(Block block, const Step<T>& s, Phase phase, int layer) {
  block.threads([&](int thread) {
    if (thread == 0) *reinterpret_cast<Task<T>*>(block.shared()) = task_of(s, phase, layer);
  });
}

template <int B, class T>
DEVICE_CALL void project(Block block, const Step<T>& s, Phase phase, int layer) {
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

// Brings what each warp will read first of a coming projection, and its norm, to the second-level
// cache: asked for before a barrier, it arrives while blocks wait there. Of 270M that is all of a
// projection. It is 17 MB on 132 multiprocessors at the most.
constexpr int64_t kAhead = 32;  // units

template <class T>
DEVICE_CALL void prefetch_task(Block block, const Step<T>& s, Phase phase, int layer) {
  const Task<T> t = task_of(s, phase, layer);
  const Weight& w = t.weight;
  const BlockRows all = rows_of(t.outputs, t.paired, block.index, s.grid);
  const BlockRows rows = round_of(all, all.outputs.first);
  const int64_t units = units_of(w), bytes = row_length(w), unit = unit_bytes(w.form);
  const int64_t lines = unit / kLine;
  block.warps([&](Warp warp) {
    const Range mine = share(rows.count() * units, warp.index, kWarps);
    const int64_t count = smallest(mine.size(), kAhead) * lines;
    warp.each([&](int lane) {
      for (int64_t i = lane; i < count; i += kLanes) {
        const int64_t u = mine.first + i / lines, at = u % units * unit + i % lines * kLine;
        if (at < bytes) prefetch(w.row(rows.row(u / units)) + at);
      }
      if (w.form == Form::Packed12 && warp.index < 2 && lane == 0 && rows.count() > 0)
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
