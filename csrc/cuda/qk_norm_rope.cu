// qk_norm_rope on CUDA, for few tokens: one launch, a warp for each head of each token.
//
// With few tokens the time is that of the launch, and after it that of the way through one head. A
// head and its weight are loaded while the position is, then the table's row, and a sum over the
// warp needs no barrier. Any number of tokens is right, but the Triton kernel is the one for many.
// Not measured on a GPU.
#include "cuda/heads.cuh"
#include "cuda/partials.cuh"

namespace {

using heads::Backward;
using heads::Forward;
using heads::Layer;
using heads::Strided;

// The 1 in the bounds of the kernels lets the compiler use all registers before it spills.
constexpr int kThreads = heads::kWarps * kLanes;

template <int N, class T, class W>
__global__ void __launch_bounds__(kThreads, 1)
    heads_fwd(const __grid_constant__ Forward<T, W> forward) {
  const simt::Warp warp{static_cast<int>(threadIdx.x) / kLanes};
  heads::run_forward<N>(warp, forward, blockIdx.x, gridDim.x,
                        static_cast<int64_t>(blockIdx.y) * heads::kWarps + warp.index,
                        static_cast<int64_t>(gridDim.y) * heads::kWarps);
}

template <int N, class T, class W>
__global__ void __launch_bounds__(kThreads, 1)
    heads_bwd(const __grid_constant__ Backward<T, W> backward) {
  const simt::Warp warp{static_cast<int>(threadIdx.x) / kLanes};
  heads::run_backward<N>(warp, backward,
                         static_cast<int64_t>(blockIdx.x) * heads::kWarps + warp.index,
                         static_cast<int64_t>(gridDim.x) * heads::kWarps);
}

// [batch, length], [batch, length, width] (heads of head_dim) or [batch, length, heads, head_dim].
// The stride of a dimension of size 1 may be any number.
template <class T>
Strided<T> strided(const Tensor& x, int64_t head_dim) {
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  const int64_t head = x.dim() == 4 ? stride(2) : x.dim() == 3 ? head_dim : 0;
  return {data<T>(x), stride(0), stride(1), head};
}

// A layer as the op gets it.
struct LayerInputs {
  const Tensor& qkv;
  const Optional &q_weight, &k_weight;
  const Tensor &positions, &rope_table;
  int64_t q_heads, kv_heads;
  double eps;

  // A tensor of the kernels' weight type.
  const Tensor& weight() const { return q_weight ? *q_weight : qkv; }
  int64_t tokens() const { return qkv.numel() == 0 ? 0 : qkv.size(0) * qkv.size(1); }
};

// What its kernels read, kept until they are launched.
struct Parts {
  Tensor table;
  Optional q_weight, k_weight;

  explicit Parts(const LayerInputs& in) : table(as_contiguous(in.rope_table)) {
    if (in.q_weight) q_weight = as_contiguous(*in.q_weight);
    if (in.k_weight) k_weight = as_contiguous(*in.k_weight);
  }

  template <class T, class W>
  Layer<T, W> layer(const LayerInputs& in) const {
    const auto pointer = [](const Optional& w) { return w ? data<const W>(*w) : nullptr; };
    Layer<T, W> layer{};
    layer.sizes.tokens = in.tokens();
    layer.sizes.length = in.qkv.size(1);
    layer.sizes.q_heads = in.q_heads;
    layer.sizes.kv_heads = in.kv_heads;
    layer.sizes.head_dim = table.size(1);
    layer.sizes.table_length = table.size(0);
    layer.sizes.eps = static_cast<float>(in.eps);
    layer.qkv = strided<const T>(in.qkv, table.size(1));
    layer.q_weight = pointer(q_weight);
    layer.k_weight = pointer(k_weight);
    layer.positions = strided<const int64_t>(in.positions, 0);
    layer.table = data<const float>(table);
    return layer;
  }
};

// fn(N) with N columns to a lane: 16 bytes if everything is aligned to them, else one column.
template <class T, class Call, class Fn>
void with_columns(const Call& call, Fn&& fn) {
  if (call.aligned()) {
    fn(std::integral_constant<int, kBytes / sizeof(T)>{});
  } else {
    fn(std::integral_constant<int, 1>{});
  }
}

// Where k and v go. Without slots v stays in qkv.
struct Targets {
  const Tensor& k;
  const Tensor *v = nullptr, *slots = nullptr;
};

// Launches the forward on the heads of qkv.
Tensor launch_fwd(const LayerInputs& in, const Targets& to) {
  const int64_t head_dim = in.rope_table.size(1);
  const int64_t shape[] = {in.qkv.size(0), in.qkv.size(1), in.q_heads, head_dim};
  Tensor q = torch::stable::new_empty(in.qkv, {shape, 4});
  if (in.tokens() == 0) return q;
  const torch::stable::accelerator::DeviceGuard guard(in.qkv.get_device_index());
  const Parts parts(in);
  with_dtypes(in.qkv, in.weight(), [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    Forward<T, W> forward{};
    forward.layer = parts.layer<T, W>(in);
    forward.layer.sizes.max_length = to.k.size(1);
    forward.q = strided<T>(q, head_dim);
    forward.k = strided<T>(to.k, head_dim);
    if (to.slots != nullptr) {
      forward.v = strided<T>(*to.v, head_dim);
      forward.slots = strided<const int64_t>(*to.slots, 0);
    }
    const heads::Grid grid = heads::grid_of(forward.layer.sizes.tokens, forward.heads());
    with_columns<T>(forward, [&](auto columns) {
      heads_fwd<decltype(columns)::value, T, W>
          <<<dim3(grid.tokens, grid.groups), kThreads, 0, stream_of(in.qkv)>>>(forward);
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
  Tensor q =
      launch_fwd({qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps}, {k});
  return {q, k};
}

Tensor qk_norm_rope_cache(const Tensor& qkv, const Optional& q_weight, const Optional& k_weight,
                          const Tensor& positions, const Tensor& rope_table, int64_t q_heads,
                          int64_t kv_heads, double eps, Tensor k_cache, Tensor v_cache,
                          const Tensor& slots) {
  return launch_fwd({qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps},
                    {k_cache, &v_cache, &slots});
}

// dweight from the partial sums of `warps` warps (zeros of none); empty if there is no weight.
Tensor sum_of(const float* partials, const Optional& weight, int64_t warps, const Tensor& qkv) {
  const int64_t none[] = {0};
  if (!weight) return torch::stable::new_empty(qkv, {none, 1});
  Tensor out = torch::stable::new_empty(*weight, weight->sizes());
  with_dtype(out, [&](auto t) {
    using W = decltype(t);
    launch_sum(partials, data<W>(out), warps, out.numel(), stream_of(qkv));
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
  const LayerInputs in{qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps};
  const Parts parts(in);
  // Reasoned: four blocks of four warps fill a multiprocessor's registers. Without tokens there are
  // no blocks, and the sums are zero.
  const int64_t all = (in.tokens() * (q_heads + kv_heads) + heads::kWarps - 1) / heads::kWarps;
  const int64_t blocks = std::min<int64_t>(all, 4 * multiprocessors(qkv));
  const int64_t warps = blocks * heads::kWarps, shape[] = {2, q_weight ? warps : 0, head_dim};
  Tensor partials = torch::stable::new_empty(qkv, {shape, 3}, ScalarType::Float);
  float* sums = data<float>(partials);
  if (blocks > 0) {
    with_dtypes(qkv, in.weight(), [&](auto t, auto u) {
      using T = decltype(t);
      using W = decltype(u);
      Backward<T, W> backward{};
      backward.layer = parts.layer<T, W>(in);
      backward.dq = strided<const T>(dq, head_dim);
      backward.dk = strided<const T>(dk, head_dim);
      backward.dv = strided<const T>(dv, head_dim);
      backward.dqkv = strided<T>(dqkv, head_dim);
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
