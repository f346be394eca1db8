// qk_norm_rope of one head by one warp, forward and backward, as sections of the warp (simt.cuh).
//
// A lane has N neighbouring columns of the first half of a head and the same ones of the second,
// which the rotation turns into each other. Heads of more columns than a warp's lanes have at once
// go through memory twice. All loads of a head are under way before the first sum is needed.
#pragma once

#include "cuda/heads_plan.cuh"
#include "cuda/simt.cuh"

namespace heads {

using namespace simt;

// N columns of both halves of a head.
template <int N>
struct Pair {
  float a[N], b[N];
};

template <int N, class X>
DEVICE_INLINE void load_pair(Pair<N>& p, const X* from, int64_t half, int64_t column) {
  load(p.a, from + column);
  load(p.b, from + half + column);
}
template <int N, class X>
DEVICE_INLINE void store_pair(X* to, int64_t half, int64_t column, const Pair<N>& p) {
  store(to + column, p.a);
  store(to + half + column, p.b);
}
template <int N>
DEVICE_INLINE void fill_pair(Pair<N>& p, float x) {
#pragma unroll
  for (int j = 0; j < N; ++j) p.a[j] = p.b[j] = x;
}
// cos and sin; NaN if the position isn't in the table.
template <int N>
DEVICE_INLINE void load_rotation(Pair<N>& p, const float* rotation, int64_t half, int64_t column) {
  if (rotation != nullptr) return load_pair(p, rotation, half, column);
  fill_pair(p, NAN);
}

template <int N>
DEVICE_INLINE float squares(const Pair<N>& x, float sum) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum += x.a[j] * x.a[j] + x.b[j] * x.b[j];
  return sum;
}

// y = rotate(round(x rstd) weight); the product is rounded if the weight has the dtype of x.
template <class T, class W, int N>
DEVICE_INLINE void normalize(Pair<N>& x, const Pair<N>& weight, float rstd) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x.a[j] = rounded<W>(rounded<T>(x.a[j] * rstd) * weight.a[j]);
    x.b[j] = rounded<W>(rounded<T>(x.b[j] * rstd) * weight.b[j]);
  }
}
template <int N>
DEVICE_INLINE void rotate(Pair<N>& x, const Pair<N>& rotation) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float a = x.a[j], b = x.b[j];
    x.a[j] = a * rotation.a[j] - b * rotation.b[j];
    x.b[j] = b * rotation.a[j] + a * rotation.b[j];
  }
}

template <int N, class T>
DEVICE_INLINE void copy_head(Warp warp, const T* from, T* to, int64_t half) {
  warp.each([&](int lane) {
    for (int64_t c = lane * N; c < half; c += kLanes * N) {
      Pair<N> x;
      load_pair(x, from, half, c);
      store_pair(to, half, c, x);
    }
  });
}

// A pair as it lies in memory: nothing waits for its load before it is widened.
template <int N, class X>
struct Raw {
  Vector<X, N> a, b;

  DEVICE_INLINE void load(const X* from, int64_t half, int64_t column) {
    a = vector_at<N>(from + column);
    b = vector_at<N>(from + half + column);
  }
  DEVICE_INLINE void fill(X x) {
#pragma unroll
    for (int j = 0; j < N; ++j) a.v[j] = b.v[j] = x;
  }
  DEVICE_INLINE Pair<N> widened() const {
    Pair<N> p;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      p.a[j] = wide(a.v[j]);
      p.b[j] = wide(b.v[j]);
    }
    return p;
  }
};

// A lane's columns of a head, loaded.
template <int N, class T, class W>
struct LoadedHead {
  Raw<N, T> x;
  Raw<N, W> weight;
  Raw<N, float> rotation;

  DEVICE_INLINE void load_rotation(const float* from, int64_t half, int64_t column) {
    if (from != nullptr) {
      rotation.load(from, half, column);
    } else {
      rotation.fill(NAN);
    }
  }
  DEVICE_INLINE void send(T* to, int64_t half, int64_t column, bool norm, float rstd) const {
    Pair<N> y = x.widened();
    if (norm) normalize<T, W>(y, weight.widened(), rstd);
    rotate(y, rotation.widened());
    store_pair(to, half, column, y);
  }
};

// Everything that a head's first columns need is asked for before anything waits: the position
// first, since the table's row can only be asked for once it is there.
template <int N, class T, class W>
DEVICE_INLINE void head_forward(Warp warp, const Forward<T, W>& f, const TokenHead& at) {
  const Layer<T, W>& layer = f.layer;
  const int64_t half = layer.sizes.half(), step = kLanes * N;
  const int64_t slot = slot_of(f, at);
  const T* from = layer.qkv.at(at.batch, at.token, at.head);
  if (at.kind == Kind::Value) {
    if (T* to = target_of(f, at, slot)) copy_head<N>(warp, from, to, half);
    return;
  }
  const int64_t position = *layer.positions.at(at.batch, at.token);
  const W* weight = at.kind == Kind::Query ? layer.q_weight : layer.k_weight;
  const bool norm = weight != nullptr;
  PerLane<LoadedHead<N, T, W>> loaded;
  PerLane<Floats<1>> sum;
  warp.each([&](int lane) {
    if (lane * N >= half) return;
    loaded[lane].x.load(from, half, lane * N);
    if (norm) loaded[lane].weight.load(weight, half, lane * N);
  });
  const float* rotation = layer.rotation(position);
  warp.each([&](int lane) {
    sum[lane].v[0] = 0.0f;
    if (lane * N >= half) return;
    loaded[lane].load_rotation(rotation, half, lane * N);
    if (!norm) return;
    float total = squares(loaded[lane].x.widened(), 0.0f);
#pragma unroll 1
    for (int64_t c = lane * N + step; c < half; c += step) {
      Pair<N> x;
      load_pair(x, from, half, c);
      total = squares(x, total);
    }
    sum[lane].v[0] = total;
  });
  if (norm) warp.template sum<kLanes>(sum);
  T* to = target_of(f, at, slot);
  if (to == nullptr) return;
  warp.each([&](int lane) {
    const float n = static_cast<float>(2 * half);
    const float rstd = inverse_root(sum[lane].v[0] / n + layer.sizes.eps);
    if (lane * N >= half) return;
    LoadedHead<N, T, W>& h = loaded[lane];
    h.send(to, half, lane * N, norm, rstd);
#pragma unroll 1
    for (int64_t c = lane * N + step; c < half; c += step) {
      h.x.load(from, half, c);
      if (norm) h.weight.load(weight, half, c);
      h.load_rotation(rotation, half, c);
      h.send(to, half, c, norm, rstd);
    }
  });
}

// A warp's heads: every token_step-th token from `token` on, of each every head_step-th head.
template <int N, class T, class W>
DEVICE_INLINE void run_forward(Warp warp, const Forward<T, W>& f, int64_t token, int64_t token_step,
                               int64_t head, int64_t head_step) {
  const int64_t heads = f.heads();
#pragma unroll 1
  for (; token < f.layer.sizes.tokens; token += token_step)
#pragma unroll 1
    for (int64_t h = head; h < heads; h += head_step)
      head_forward<N>(warp, f, token_head(f.layer.sizes, token, h));
}

// The gradient of what was rotated, with what its norm's gradient needs.
template <int N>
struct Gradient {
  Pair<N> du, x, weight;
};

template <int N, class T, class W>
DEVICE_INLINE void load_gradient(Gradient<N>& g, const HeadGradient<T>& r, const W* weight,
                                 int64_t half, int64_t column) {
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
DEVICE_INLINE void add_sums(const Gradient<N>& g, Floats<2>& sums) {
  sums.v[0] = squares(g.x, sums.v[0]);
#pragma unroll
  for (int j = 0; j < N; ++j)
    sums.v[1] += g.du.a[j] * g.weight.a[j] * g.x.a[j] + g.du.b[j] * g.weight.b[j] * g.x.b[j];
}

// One number through the norm's backward: dx, and its term of dweight.
template <class T>
DEVICE_INLINE float norm_gradient(float du, float x, float weight, float rstd, float mean,
                                  float& dweight) {
  const float z = x * rstd;
  dweight += du * rounded<T>(z);
  return rstd * (du * weight - z * mean);
}
template <class T, int N>
DEVICE_INLINE void norm_gradients(Gradient<N>& g, float rstd, float mean, Pair<N>& dweight) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g.du.a[j] = norm_gradient<T>(g.du.a[j], g.x.a[j], g.weight.a[j], rstd, mean, dweight.a[j]);
    g.du.b[j] = norm_gradient<T>(g.du.b[j], g.x.b[j], g.weight.b[j], rstd, mean, dweight.b[j]);
  }
}

// One head's dx. Its share of dweight joins `kept` for a warp's first columns, and for those beyond
// them `partial`, which the warp has for itself.
template <int N, class T, class W>
DEVICE_INLINE void head_backward(Warp warp, const Sizes& s, const HeadGradient<T>& r,
                                 const W* weight, PerLane<Pair<N>>& kept, float* partial) {
  const int64_t half = s.half(), step = kLanes * N;
  const bool norm = weight != nullptr;
  PerLane<Gradient<N>> loaded;
  PerLane<Floats<2>> sums;
  warp.each([&](int lane) {
    const int64_t first = lane * N;
    sums[lane].v[0] = sums[lane].v[1] = 0.0f;
    if (first >= half) return;
    load_gradient(loaded[lane], r, weight, half, first);
    if (!norm) return;
    add_sums(loaded[lane], sums[lane]);
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
    const float rstd = inverse_root(sums[lane].v[0] / n + s.eps);
    const float mean = sums[lane].v[1] * rstd / n;
    if (first >= half) return;
    Gradient<N>& g = loaded[lane];
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
DEVICE_INLINE void run_backward(Warp warp, const Backward<T, W>& b, int64_t index, int64_t warps) {
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
      head_backward(warp, s, head_gradient(b, kind, i), weight, kept, partial);
    if (weight == nullptr) continue;
    warp.each([&](int lane) {
      if (lane * N < half) store_pair(partial, half, lane * N, kept[lane]);
    });
  }
#pragma unroll 1
  for (int64_t i = index; i < s.tokens * s.kv_heads; i += warps) {
    const HeadGradient<T> r = head_gradient(b, Kind::Value, i);
    copy_head<N>(warp, r.dy, r.dx, half);
  }
}

}  // namespace heads
