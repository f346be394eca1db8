// qk_norm_rope: forward moves the q and k columns of qkv once in and once out (and v, with a
// cache); backward reads qkv, dq, dk, dv and writes dqkv. A token's heads share its rotation.
#include "cpu/op.h"
#include "cpu/refuse.h"
#include "cpu/rope.h"

namespace {

// A tensor [batch, length, heads, head_dim] or [batch, length, width] addressed by token.
template <class T>
struct Tokens {
  T* data;
  int64_t length, batch_stride, length_stride, head_stride;

  explicit Tokens(const Tensor& x)
      : data(::data<T>(x)),
        length(x.size(1)),
        batch_stride(x.stride(0)),
        length_stride(x.stride(1)),
        head_stride(x.dim() == 4 ? x.stride(2) : 0) {}

  T* operator[](int64_t token) const {
    return data + (token / length) * batch_stride + (token % length) * length_stride;
  }
};

// What the kernels read of one layer: head counts, weights, rotations.
template <class T, class W>
struct Layer {
  int64_t q_heads, kv_heads, head_dim;
  const W *q_weight, *k_weight;
  Tokens<const int64_t> positions;
  const float* table;
  float eps;

  const float* rotation(int64_t token) const { return table + *positions[token] * head_dim; }
};

// The same as the op gets it.
struct LayerInputs {
  const Tensor& qkv;
  const Optional &q_weight, &k_weight;
  const Tensor &positions, &table;
  int64_t q_heads, kv_heads;
  double eps;
};

[[gnu::noinline]] void check_index(const char* name, const Tensor& index, int64_t limit,
                                   const char* what) {
  const Tokens<const int64_t> at(index);
  for (int64_t i = 0, n = index.numel(); i < n; ++i)
    if (*at[i] < 0 || *at[i] >= limit)
      refuse(name, " must be in [0, ", limit, ") (", what, "), got ", *at[i]);
}

// A head in the backward, or the first of some that follow each other in x and dx.
template <class T>
struct HeadGradient {
  const T *dy, *x;
  const float* rotation;
  T* dx;
};

// dx of the head, and dweight += du round(z); `du` is scratch of head_dim floats.
template <class T>
inline void head_backward(const HeadGradient<T>& head, const float* weight, float* du,
                          float* dweight, int64_t half, float eps) {
  const auto [dy, x, rotation, dx] = head;
  sweep(half, [&](int64_t i, auto part) {
    const Vec cos = load(rotation + i, part), sin = load(rotation + half + i, part);
    const Vec a = load(dy + i, part), b = load(dy + half + i, part);
    const Vec da = fma(b, sin, a * cos), db = fnma(a, sin, b * cos);
    if (weight == nullptr) {
      store(dx + i, da, part);
      store(dx + half + i, db, part);
    } else {
      store(du + i, da, part);
      store(du + half + i, db, part);
    }
  });
  if (weight == nullptr) return;
  const int64_t n = 2 * half;
  float sums[2];
  sweep_sums(n, sums, [&](int64_t i, auto part, Vec* acc) {
    const Vec a = load(x + i, part);
    acc[0] = fma(a, a, acc[0]);
    acc[1] = fma(load(du + i, part) * load(weight + i, part), a, acc[1]);
  });
  const float rstd = rstd_of(sums[0], n, eps);
  const Vec scale = vec(rstd), mean = vec(sums[1] * rstd / static_cast<float>(n));
  sweep(n, [&](int64_t i, auto part) {
    const Vec d = load(du + i, part), z = load(x + i, part) * scale;
    store(dx + i, scale * fnma(z, mean, d * load(weight + i, part)), part);
    store(dweight + i, fma(d, round_to<T>(z), load(dweight + i, part)), part);
  });
}

// The same for `count` heads; those of dy are `stride` apart. Like heads_forward it is called for
// queries and for keys, not inlined twice: that took half of this file's compilation.
template <class T, class Half>
[[gnu::noinline]] void heads_backward(HeadGradient<T> head, int64_t stride, int64_t count,
                                      const float* weight, float* du, float* dweight, Half half,
                                      float eps) {
  for (int64_t h = 0; h < count; ++h) {
    head_backward(head, weight, du, dweight, half, eps);
    head.dy += stride;
    head.x += 2 * half;
    head.dx += 2 * half;
  }
}

// y = rotate(norm(x)) for `count` heads that follow each other; those of y are `stride` apart.
template <class T, class W, class Half>
[[gnu::noinline]] void heads_forward(const T* x, const W* weight, const float* rotation, T* y,
                                     int64_t stride, int64_t count, Half half, float eps) {
  for (int64_t h = 0; h < count; ++h, x += 2 * half, y += stride)
    head_forward(x, weight, rotation, y, half, eps);
}

// fn(layer, half) with these weights; half is a compile-time constant for head_dim 64 and 128.
template <class T, class W, class Fn>
void with_weights(const LayerInputs& in, const W* q_weight, const W* k_weight, Fn&& fn) {
  check_index("positions", in.positions, in.table.size(0), "rope_table's length");
  const Tensor table = as_contiguous(in.table);
  const Layer<T, W> layer{in.q_heads,
                          in.kv_heads,
                          table.size(1),
                          in.q_weight ? q_weight : nullptr,
                          in.k_weight ? k_weight : nullptr,
                          Tokens<const int64_t>(in.positions),
                          data<const float>(table),
                          static_cast<float>(in.eps)};
  with_half(layer.head_dim, [&](auto half) { fn(layer, half); });
}

// fn(Layer<T, W>, half).
template <class Fn>
void with_layer(const LayerInputs& in, Fn&& fn) {
  const Tensor qw = in.q_weight ? as_contiguous(*in.q_weight) : in.qkv;
  const Tensor kw = in.k_weight ? as_contiguous(*in.k_weight) : in.qkv;
  with_dtypes(in.qkv, qw, [&](auto t, auto u) {
    using W = decltype(u);
    with_weights<decltype(t)>(in, data<const W>(qw), data<const W>(kw), fn);
  });
}

// A weight as floats. The backward only multiplies by it, so that its own dtype changes nothing.
std::vector<float> widened_weight(const Optional& weight) {
  if (!weight) return {};
  const Tensor w = as_contiguous(*weight);
  std::vector<float> found(width_of(w));
  with_dtype(w, [&](auto t) {
    const auto* from = data<const decltype(t)>(w);
    sweep(width_of(w), [&](int64_t i, auto part) {
      store(found.data() + i, load(from + i, part), part);
    });
  });
  return found;
}

// fn(Layer<T, float>, half).
template <class Fn>
void with_wide_layer(const LayerInputs& in, Fn&& fn) {
  const auto qw = widened_weight(in.q_weight), kw = widened_weight(in.k_weight);
  with_dtype(in.qkv,
             [&](auto t) { with_weights<decltype(t)>(in, qw.data(), kw.data(), fn); });
}

template <class T, class W, class Half>
inline void token_forward(const Layer<T, W>& layer, Half half, const T* x, const float* rotation,
                          T* q, T* k, int64_t k_stride) {
  heads_forward(x, layer.q_weight, rotation, q, 2 * half, layer.q_heads, half, layer.eps);
  heads_forward(x + layer.q_heads * 2 * half, layer.k_weight, rotation, k, k_stride, layer.kv_heads,
                half, layer.eps);
}

std::tuple<Tensor, Tensor> qk_norm_rope_fwd(const Tensor& qkv, Optional q_weight, Optional k_weight,
                                            const Tensor& positions, const Tensor& table,
                                            int64_t q_heads, int64_t kv_heads, double eps) {
  const int64_t batch = qkv.size(0), length = qkv.size(1), head_dim = table.size(1);
  Tensor q = output(qkv, {batch, length, q_heads, head_dim});
  Tensor k = output(qkv, {batch, length, kv_heads, head_dim});
  with_layer({qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps},
             [&]<class T, class W>(const Layer<T, W>& layer, auto half) {
               const Tokens<const T> in(qkv);
               const int64_t elements = (q_heads + kv_heads) * head_dim;
               parallel_rows(batch * length, elements, [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   token_forward(layer, half, in[t], layer.rotation(t),
                                 data<T>(q) + t * q_heads * head_dim,
                                 data<T>(k) + t * kv_heads * head_dim, head_dim);
                 }
               });
             });
  return {q, k};
}

Tensor qk_norm_rope_cache(const Tensor& qkv, Optional q_weight, Optional k_weight,
                          const Tensor& positions, const Tensor& table, int64_t q_heads,
                          int64_t kv_heads, double eps, Tensor k_cache, Tensor v_cache,
                          const Tensor& slots) {
  const int64_t batch = qkv.size(0), length = qkv.size(1), head_dim = table.size(1);
  check_index("slots", slots, k_cache.size(1), "the cache's length");
  Tensor q = output(qkv, {batch, length, q_heads, head_dim});
  with_layer({qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps},
             [&]<class T, class W>(const Layer<T, W>& layer, auto half) {
               const Tokens<const T> in(qkv);
               const Tokens<const int64_t> slot(slots);
               const Tokens<T> keys(k_cache), values(v_cache);
               const int64_t elements = (q_heads + 2 * kv_heads) * head_dim;
               parallel_rows(batch * length, elements, [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const int64_t b = t / length, at = *slot[t];
                   T* k = keys.data + b * keys.batch_stride + at * keys.length_stride;
                   T* v = values.data + b * values.batch_stride + at * values.length_stride;
                   token_forward(layer, half, in[t], layer.rotation(t),
                                 data<T>(q) + t * q_heads * head_dim, k, keys.head_stride);
                   const T* value = in[t] + (q_heads + kv_heads) * head_dim;
                   for (int64_t h = 0; h < kv_heads; ++h)
                     std::memcpy(v + h * values.head_stride, value + h * head_dim,
                                 head_dim * sizeof(T));
                 }
               });
             });
  return q;
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(const Tensor& dq, const Tensor& dk,
                                                    const Tensor& dv, const Tensor& qkv,
                                                    Optional q_weight, Optional k_weight,
                                                    const Tensor& positions, const Tensor& table,
                                                    double eps) {
  const int64_t tokens = qkv.size(0) * qkv.size(1), head_dim = table.size(1);
  const int64_t q_heads = dq.size(2), kv_heads = dk.size(2);
  Tensor dqkv = output_like(qkv);
  Tensor dq_weight = q_weight ? output_like(*q_weight) : output(qkv, {0});
  Tensor dk_weight = k_weight ? output_like(*k_weight) : output(qkv, {0});
  RowSum total(tokens, 2 * head_dim);
  with_wide_layer(
      {qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps},
      [&]<class T>(const Layer<T, float>& layer, auto half) {
        const Tokens<const T> in(qkv), grad_q(dq), grad_k(dk), grad_v(dv);
        const int64_t width = (q_heads + 2 * kv_heads) * head_dim;
        total.run(2 * width, [&](int64_t begin, int64_t end, float* partial) {
          // A token's heads are summed before they join the block, so that no sum is long.
          std::vector<float> scratch(3 * head_dim);
          float* du = scratch.data();
          float* token_sum = du + head_dim;
          for (int64_t t = begin; t < end; ++t) {
            const T* x = in[t];
            T* dx = data<T>(dqkv) + t * width;
            const float* rotation = layer.rotation(t);
            std::fill(token_sum, token_sum + 2 * head_dim, 0.0f);
            heads_backward<T>({grad_q[t], x, rotation, dx}, grad_q.head_stride, q_heads,
                              layer.q_weight, du, token_sum, half, layer.eps);
            x += q_heads * head_dim;
            dx += q_heads * head_dim;
            heads_backward<T>({grad_k[t], x, rotation, dx}, grad_k.head_stride, kv_heads,
                              layer.k_weight, du, token_sum + head_dim, half, layer.eps);
            dx += kv_heads * head_dim;
            for (int64_t h = 0; h < kv_heads; ++h, dx += head_dim)
              std::memcpy(dx, grad_v[t] + h * grad_v.head_stride, head_dim * sizeof(T));
            sweep(2 * head_dim, [&](int64_t i, auto part) {
              store(partial + i, load(partial + i, part) + load(token_sum + i, part), part);
            });
          }
        });
      });
  const auto write = [&](const Tensor& dweight, int64_t first) {
    with_dtype(dweight,
               [&](auto t) { total.write(data<decltype(t)>(dweight), first, head_dim); });
  };
  if (q_weight) write(dq_weight, 0);
  if (k_weight) write(dk_weight, head_dim);
  return {dqkv, dq_weight, dk_weight};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_cache", TORCH_BOX(&qk_norm_rope_cache));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}
