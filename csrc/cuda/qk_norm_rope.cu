// qk_norm_rope on CUDA, for few tokens: one launch, a warp for each head of each token.
//
// Of few tokens the launch is the time, and after it the way through one head: a head and its
// weight are loaded while the position is, the table's row after that, and a sum over the warp
// needs no barrier. Any number of tokens is right; many of them are what the Triton kernel is for.
// Not measured on a GPU.
#include "heads.cuh"
#include "partials.cuh"

namespace {

using heads::Backward;
using heads::Forward;
using heads::Layer;
using heads::Places;
using Optional = std::optional<Tensor>;

// The 1 in the bounds of the kernels lets the compiler use all registers before it spills.
constexpr int kThreads = heads::kWarps * kWarp;

template <int N, class T, class W>
__global__ void __launch_bounds__(kThreads, 1)
    heads_fwd(const __grid_constant__ Forward<T, W> forward) {
  const decode::Warp warp{static_cast<int>(threadIdx.x) / kWarp};
  heads::run_forward<N>(warp, forward, blockIdx.x, gridDim.x,
                        static_cast<int64_t>(blockIdx.y) * heads::kWarps + warp.index,
                        static_cast<int64_t>(gridDim.y) * heads::kWarps);
}

template <int N, class T, class W>
__global__ void __launch_bounds__(kThreads, 1)
    heads_bwd(const __grid_constant__ Backward<T, W> backward) {
  const decode::Warp warp{static_cast<int>(threadIdx.x) / kWarp};
  heads::run_backward<N>(warp, backward,
                         static_cast<int64_t>(blockIdx.x) * heads::kWarps + warp.index,
                         static_cast<int64_t>(gridDim.x) * heads::kWarps);
}

// [batch, length], [batch, length, width] (heads of head_dim) or [batch, length, heads, head_dim].
// Where there is one only, a stride may be any number.
template <class T>
Places<T> places(const Tensor& x, int64_t head_dim) {
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  const int64_t head = x.dim() == 4 ? stride(2) : x.dim() == 3 ? head_dim : 0;
  return {static_cast<T*>(x.data_ptr()), stride(0), stride(1), head};
}

// What a layer's kernels read, kept until they are launched.
struct Parts {
  Tensor table;
  Optional q_weight, k_weight;

  Parts(const Tensor& rope_table, const Optional& q, const Optional& k)
      : table(packed(rope_table)) {
    if (q) q_weight = packed(*q);
    if (k) k_weight = packed(*k);
  }

  template <class T, class W>
  Layer<T, W> layer(const Tensor& qkv, const Tensor& positions, int64_t q_heads, int64_t kv_heads,
                    double eps) const {
    const auto data = [](const Optional& w) {
      return w ? static_cast<const W*>(w->data_ptr()) : nullptr;
    };
    Layer<T, W> layer{};
    layer.sizes.tokens = qkv.size(0) * qkv.size(1);
    layer.sizes.length = qkv.size(1);
    layer.sizes.q_heads = q_heads;
    layer.sizes.kv_heads = kv_heads;
    layer.sizes.head_dim = table.size(1);
    layer.sizes.table_length = table.size(0);
    layer.sizes.eps = static_cast<float>(eps);
    layer.qkv = places<const T>(qkv, table.size(1));
    layer.q_weight = data(q_weight);
    layer.k_weight = data(k_weight);
    layer.positions = places<const int64_t>(positions, 0);
    layer.table = static_cast<const float*>(table.data_ptr());
    return layer;
  }
};

// fn(N) with N columns to a lane: 16 bytes where everything divides, else one.
template <class T, class Call, class Fn>
void with_columns(const Call& call, Fn&& fn) {
  if (call.aligned()) {
    fn(std::integral_constant<int, kBytes / sizeof(T)>{});
  } else {
    fn(std::integral_constant<int, 1>{});
  }
}

// Launches the forward on qkv's q and k, and with slots on v too, into k and v.
Tensor launch_fwd(const Tensor& qkv, const Optional& q_weight, const Optional& k_weight,
                  const Tensor& positions, const Tensor& rope_table, int64_t q_heads,
                  int64_t kv_heads, double eps, const Tensor& k, const Tensor* v,
                  const Tensor* slots) {
  const int64_t head_dim = rope_table.size(1);
  const int64_t shape[] = {qkv.size(0), qkv.size(1), q_heads, head_dim};
  Tensor q = torch::stable::new_empty(qkv, {shape, 4});
  if (qkv.numel() == 0) return q;
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Parts parts(rope_table, q_weight, k_weight);
  with_dtypes(qkv, q_weight ? *q_weight : qkv, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    Forward<T, W> forward{};
    forward.layer = parts.layer<T, W>(qkv, positions, q_heads, kv_heads, eps);
    forward.layer.sizes.max_length = k.size(1);
    forward.q = places<T>(q, head_dim);
    forward.k = places<T>(k, head_dim);
    if (slots != nullptr) {
      forward.v = places<T>(*v, head_dim);
      forward.slots = places<const int64_t>(*slots, 0);
    }
    const heads::Grid grid = heads::grid_of(forward.layer.sizes.tokens, forward.heads());
    with_columns<T>(forward, [&](auto columns) {
      heads_fwd<decltype(columns)::value, T, W>
          <<<dim3(grid.tokens, grid.groups), kThreads, 0, stream_of(qkv)>>>(forward);
    });
  });
  check(cudaGetLastError(), "launching qk_norm_rope");
  return q;
}

std::tuple<Tensor, Tensor> qk_norm_rope_fwd(const Tensor& qkv, const Optional& q_weight,
                                            const Optional& k_weight, const Tensor& positions,
                                            const Tensor& rope_table, int64_t q_heads,
                                            int64_t kv_heads, double eps) {
  const int64_t shape[] = {qkv.size(0), qkv.size(1), kv_heads, rope_table.size(1)};
  Tensor k = torch::stable::new_empty(qkv, {shape, 4});
  Tensor q = launch_fwd(qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps, k,
                        nullptr, nullptr);
  return {q, k};
}

Tensor qk_norm_rope_cache(const Tensor& qkv, const Optional& q_weight, const Optional& k_weight,
                          const Tensor& positions, const Tensor& rope_table, int64_t q_heads,
                          int64_t kv_heads, double eps, Tensor k_cache, Tensor v_cache,
                          const Tensor& slots) {
  return launch_fwd(qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps, k_cache,
                    &v_cache, &slots);
}

// dweight, from the partial sums of `warps` warps (of none, zeros); empty where there is no weight.
Tensor sum_of(const float* partials, const Optional& weight, int64_t warps, const Tensor& qkv) {
  const int64_t none[] = {0};
  if (!weight) return torch::stable::new_empty(qkv, {none, 1});
  Tensor out = torch::stable::new_empty(*weight, weight->sizes());
  with_dtype(out, [&](auto t) {
    using W = decltype(t);
    launch_sum(partials, static_cast<W*>(out.data_ptr()), warps, out.numel(), stream_of(qkv));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(const Tensor& dq, const Tensor& dk,
                                                    const Tensor& dv, const Tensor& qkv,
                                                    const Optional& q_weight,
                                                    const Optional& k_weight,
                                                    const Tensor& positions,
                                                    const Tensor& rope_table, double eps) {
  const int64_t q_heads = dq.size(2), kv_heads = dk.size(2), head_dim = rope_table.size(1);
  Tensor dqkv = torch::stable::new_empty(qkv, qkv.sizes());
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Parts parts(rope_table, q_weight, k_weight);
  // Reasoned: four blocks of four warps fill a multiprocessor's registers. None where there is
  // nothing, and then the sums are zero.
  const int64_t tokens = qkv.numel() == 0 ? 0 : qkv.size(0) * qkv.size(1);
  const int64_t all = (tokens * (q_heads + kv_heads) + heads::kWarps - 1) / heads::kWarps;
  const int64_t blocks = std::min<int64_t>(all, 4 * multiprocessors(qkv));
  const int64_t warps = blocks * heads::kWarps, shape[] = {2, q_weight ? warps : 0, head_dim};
  Tensor partials = torch::stable::new_empty(qkv, {shape, 3}, ScalarType::Float);
  float* sums = static_cast<float*>(partials.data_ptr());
  if (blocks > 0) {
    with_dtypes(qkv, q_weight ? *q_weight : qkv, [&](auto t, auto u) {
      using T = decltype(t);
      using W = decltype(u);
      Backward<T, W> backward{};
      backward.layer = parts.layer<T, W>(qkv, positions, q_heads, kv_heads, eps);
      backward.dq = places<const T>(dq, head_dim);
      backward.dk = places<const T>(dk, head_dim);
      backward.dv = places<const T>(dv, head_dim);
      backward.dqkv = places<T>(dqkv, head_dim);
      backward.dq_partial = sums;
      backward.dk_partial = sums + warps * head_dim;
      with_columns<T>(backward, [&](auto columns) {
        heads_bwd<decltype(columns)::value, T, W>
            <<<blocks, kThreads, 0, stream_of(qkv)>>>(backward);
      });
    });
  }
  Tensor dq_weight = sum_of(sums, q_weight, warps, qkv);
  Tensor dk_weight = sum_of(sums + warps * head_dim, k_weight, warps, qkv);
  check(cudaGetLastError(), "launching qk_norm_rope's backward");
  return {dqkv, dq_weight, dk_weight};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_cache", TORCH_BOX(&qk_norm_rope_cache));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}
