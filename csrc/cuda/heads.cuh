// qk_norm_rope of one head by one warp, forward and backward, as sections of the warp: nvcc
// compiles them for a GPU and a host compiler for the check without one.
//
// A lane has N neighbouring columns of the first half of a head and the same ones of the second,
// which the rotation turns into each other. Heads of more columns than a warp's lanes have at once
// go through memory twice. All loads of a head are under way before the first sum is needed.
#pragma once

#include "decode_lanes.cuh"
#include "heads_plan.cuh"

namespace heads {

using namespace decode;

constexpr int kLanes = decode::kLanes;

// N columns of both halves of a head.
template <int N>
struct Pair {
  float a[N], b[N];
};

template <int N, class X>
DECODE_DEVICE void load_pair(Pair<N>& p, const X* from, int64_t half, int64_t column) {
  load(p.a, from + column);
  load(p.b, from + half + column);
}
template <int N, class X>
DECODE_DEVICE void store_pair(X* to, int64_t half, int64_t column, const Pair<N>& p) {
  store(to + column, p.a);
  store(to + half + column, p.b);
}
template <int N>
DECODE_DEVICE void fill_pair(Pair<N>& p, float x) {
#pragma unroll
  for (int j = 0; j < N; ++j) p.a[j] = p.b[j] = x;
}
// cos and sin; NaN where the position wasn't in the table.
template <int N>
DECODE_DEVICE void load_rotation(Pair<N>& p, const float* rotation, int64_t half, int64_t column) {
  if (rotation != nullptr) return load_pair(p, rotation, half, column);
  fill_pair(p, NAN);
}

template <int N>
DECODE_DEVICE float squares(const Pair<N>& x, float sum) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum += x.a[j] * x.a[j] + x.b[j] * x.b[j];
  return sum;
}

// y = rotate(round(x rstd) weight); the product is rounded where the weight has the dtype of x.
template <class T, class W, int N>
DECODE_DEVICE void turn(Pair<N>& x, const Pair<N>& weight, const Pair<N>& rotation, bool norm,
                        float rstd) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float a = x.a[j], b = x.b[j];
    if (norm) {
      a = rounded<W>(rounded<T>(a * rstd) * weight.a[j]);
      b = rounded<W>(rounded<T>(b * rstd) * weight.b[j]);
    }
    x.a[j] = a * rotation.a[j] - b * rotation.b[j];
    x.b[j] = b * rotation.a[j] + a * rotation.b[j];
  }
}

template <int N, class T>
DECODE_DEVICE void copy_head(Warp warp, const T* from, T* to, int64_t half) {
  warp.each([&](int lane) {
    for (int64_t c = lane * N; c < half; c += kLanes * N) {
      Pair<N> x;
      load_pair(x, from, half, c);
      store_pair(to, half, c, x);
    }
  });
}

// What a lane has of a head's first columns.
template <int N>
struct Held {
  Pair<N> x, weight, rotation;
};

template <int N, class T, class W>
DECODE_DEVICE void head_forward(Warp warp, const Forward<T, W>& f, const Trip& trip) {
  const Layer<T, W>& layer = f.layer;
  const int64_t half = layer.sizes.half(), step = kLanes * N;
  const T* from = layer.qkv.at(trip.batch, trip.at, trip.head);
  if (trip.kind == Kind::Value) {
    if (T* to = target_of(f, trip)) copy_head<N>(warp, from, to, half);
    return;
  }
  const W* weight = trip.kind == Kind::Query ? layer.q_weight : layer.k_weight;
  const bool norm = weight != nullptr;
  PerLane<Held<N>> held;
  PerLane<Floats<1>> sum;
  warp.each([&](int lane) {
    const int64_t first = lane * N;
    sum[lane].v[0] = 0.0f;
    if (first >= half) return;
    load_pair(held[lane].x, from, half, first);
    if (norm) load_pair(held[lane].weight, weight, half, first);
  });
  const float* rotation = layer.rotation(trip.batch, trip.at);
  T* to = target_of(f, trip);
  warp.each([&](int lane) {
    const int64_t first = lane * N;
    if (first >= half) return;
    load_rotation(held[lane].rotation, rotation, half, first);
    if (!norm) return;
    float total = squares(held[lane].x, 0.0f);
#pragma unroll 1
    for (int64_t c = first + step; c < half; c += step) {
      Pair<N> x;
      load_pair(x, from, half, c);
      total = squares(x, total);
    }
    sum[lane].v[0] = total;
  });
  if (norm) warp.template sum<kLanes>(sum);
  if (to == nullptr) return;
  warp.each([&](int lane) {
    const int64_t first = lane * N;
    const float mean = sum[lane].v[0] / static_cast<float>(2 * half);
    const float rstd = 1.0f / sqrtf(mean + layer.sizes.eps);
    if (first >= half) return;
    Held<N>& h = held[lane];
    turn<T, W>(h.x, h.weight, h.rotation, norm, rstd);
    store_pair(to, half, first, h.x);
#pragma unroll 1
    for (int64_t c = first + step; c < half; c += step) {
      load_pair(h.x, from, half, c);
      if (norm) load_pair(h.weight, weight, half, c);
      load_rotation(h.rotation, rotation, half, c);
      turn<T, W>(h.x, h.weight, h.rotation, norm, rstd);
      store_pair(to, half, c, h.x);
    }
  });
}

// A warp's heads: every token_step-th token from `token` on, of each every head_step-th head.
template <int N, class T, class W>
DECODE_DEVICE void run_forward(Warp warp, const Forward<T, W>& f, int64_t token, int64_t token_step,
                               int64_t head, int64_t head_step) {
  const int64_t heads = f.heads();
#pragma unroll 1
  for (; token < f.layer.sizes.tokens; token += token_step)
#pragma unroll 1
    for (int64_t h = head; h < heads; h += head_step)
      head_forward<N>(warp, f, trip_of(f.layer.sizes, token, h));
}

// The gradient of what was rotated, with what its norm's gradient needs.
template <int N>
struct Gradient {
  Pair<N> du, x, weight;
};

template <int N, class T, class W>
DECODE_DEVICE void load_gradient(Gradient<N>& g, const Return<T>& r, const W* weight, int64_t half,
                                 int64_t column) {
  Pair<N> dy, rotation;
  load_pair(dy, r.dy, half, column);
  if (weight != nullptr) {
    load_pair(g.x, r.x, half, column);
    load_pair(g.weight, weight, half, column);
  }
  load_rotation(rotation, r.rotation, half, column);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g.du.a[j] = dy.a[j] * rotation.a[j] + dy.b[j] * rotation.b[j];
    g.du.b[j] = dy.b[j] * rotation.a[j] - dy.a[j] * rotation.b[j];
  }
}

template <int N>
DECODE_DEVICE void add_sums(const Gradient<N>& g, Floats<2>& sums) {
  sums.v[0] = squares(g.x, sums.v[0]);
#pragma unroll
  for (int j = 0; j < N; ++j)
    sums.v[1] += g.du.a[j] * g.weight.a[j] * g.x.a[j] + g.du.b[j] * g.weight.b[j] * g.x.b[j];
}

// One number through the norm's backward: dx, and its term of dweight.
template <class T>
DECODE_DEVICE float norm_gradient(float du, float x, float weight, float rstd, float mean,
                                  float& dweight) {
  const float z = x * rstd;
  dweight += du * rounded<T>(z);
  return rstd * (du * weight - z * mean);
}
template <class T, int N>
DECODE_DEVICE void norm_gradients(Gradient<N>& g, float rstd, float mean, Pair<N>& dweight) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g.du.a[j] = norm_gradient<T>(g.du.a[j], g.x.a[j], g.weight.a[j], rstd, mean, dweight.a[j]);
    g.du.b[j] = norm_gradient<T>(g.du.b[j], g.x.b[j], g.weight.b[j], rstd, mean, dweight.b[j]);
  }
}

// One head's dx; its share of dweight joins `kept` and, of columns beyond a warp's first ones,
// `partial`, which the warp has for itself.
template <int N, class T, class W>
DECODE_DEVICE void head_backward(Warp warp, const Sizes& s, const Return<T>& r, const W* weight,
                                 PerLane<Pair<N>>& kept, float* partial) {
  const int64_t half = s.half(), step = kLanes * N;
  const bool norm = weight != nullptr;
  PerLane<Gradient<N>> held;
  PerLane<Floats<2>> sums;
  warp.each([&](int lane) {
    const int64_t first = lane * N;
    sums[lane].v[0] = sums[lane].v[1] = 0.0f;
    if (first >= half) return;
    load_gradient(held[lane], r, weight, half, first);
    if (!norm) return;
    add_sums(held[lane], sums[lane]);
#pragma unroll 1
    for (int64_t c = first + step; c < half; c += step) {
      Gradient<N> g;
      load_gradient(g, r, weight, half, c);
      add_sums(g, sums[lane]);
    }
  });
  if (norm) warp.template sum<kLanes>(sums);
  warp.each([&](int lane) {
    const int64_t first = lane * N;
    const float n = static_cast<float>(2 * half);
    const float rstd = 1.0f / sqrtf(sums[lane].v[0] / n + s.eps);
    const float mean = sums[lane].v[1] * rstd / n;
    if (first >= half) return;
    Gradient<N>& g = held[lane];
    if (norm) norm_gradients<T>(g, rstd, mean, kept[lane]);
    store_pair(r.dx, half, first, g.du);
#pragma unroll 1
    for (int64_t c = first + step; c < half; c += step) {
      load_gradient(g, r, weight, half, c);
      if (norm) {
        Pair<N> dweight;
        load_pair(dweight, partial, half, c);
        norm_gradients<T>(g, rstd, mean, dweight);
        store_pair(partial, half, c, dweight);
      }
      store_pair(r.dx, half, c, g.du);
    }
  });
}

// Every warps-th head of q, then of k, then of v, from the warp's own index on; the sums of both
// dweights go to its rows of the partials.
template <int N, class T, class W>
DECODE_DEVICE void run_backward(Warp warp, const Backward<T, W>& b, int64_t index, int64_t warps) {
  const Sizes& s = b.layer.sizes;
  const int64_t half = s.half(), step = kLanes * N;
#pragma unroll 1
  for (int k = 0; k < 2; ++k) {
    const Kind kind = k == 0 ? Kind::Query : Kind::Key;
    const W* weight = k == 0 ? b.layer.q_weight : b.layer.k_weight;
    float* partial = (k == 0 ? b.dq_partial : b.dk_partial) + index * s.head_dim;
    PerLane<Pair<N>> kept;
    warp.each([&](int lane) {
      fill_pair(kept[lane], 0.0f);
      if (weight == nullptr) return;
#pragma unroll 1
      for (int64_t c = lane * N + step; c < half; c += step)
        store_pair(partial, half, c, kept[lane]);
    });
#pragma unroll 1
    for (int64_t i = index; i < s.tokens * b.heads(kind); i += warps)
      head_backward(warp, s, return_of(b, kind, i), weight, kept, partial);
    if (weight == nullptr) continue;
    warp.each([&](int lane) {
      if (lane * N < half) store_pair(partial, half, lane * N, kept[lane]);
    });
  }
#pragma unroll 1
  for (int64_t i = index; i < s.tokens * s.kv_heads; i += warps) {
    const Return<T> r = return_of(b, Kind::Value, i);
    copy_head<N>(warp, r.dy, r.dx, half);
  }
}

}  // namespace heads
