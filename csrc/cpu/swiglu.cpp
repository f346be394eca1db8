// swiglu: 3 n elements moved a row forward (gate, up, y), 5 n backward (dy, gate, up, dgate, dup).
#include "cpu/op.h"
#include "cpu/simd/exponentials.h"

namespace {

Tensor swiglu_fwd(const Tensor& gate_up) {
  std::vector<int64_t> sizes(gate_up.sizes().begin(), gate_up.sizes().end());
  const int64_t n = sizes.back() /= 2;
  Tensor y = output(gate_up, sizes);
  with_dtype(gate_up, [&](auto t) {
    using T = decltype(t);
    const Rows in(gate_up);
    parallel_rows(in.count, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* gate = in.at<T>(r);
        T* out = data<T>(y) + r * n;
        sweep(n, [&](int64_t i, auto part) {
          const Vec g = load(gate + i, part);
          store(out + i, round_to<T>(silu(g, T{})) * load(gate + n + i, part), part);
        });
      }
    });
  });
  return y;
}

Tensor swiglu_bwd(const Tensor& dy, const Tensor& gate_up) {
  Tensor dgate_up = output_like(gate_up);
  with_dtype(gate_up, [&](auto t) {
    using T = decltype(t);
    const Rows in(gate_up), grad(dy);
    const int64_t n = width_of(gate_up) / 2;
    parallel_rows(in.count, 3 * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* gate = in.at<T>(r);
        const T* d = grad.at<T>(r);
        T* out = data<T>(dgate_up) + 2 * r * n;
        sweep(n, [&](int64_t i, auto part) {
          const Vec g = load(gate + i, part);
          const Vec v = load(d + i, part);
          const SiluAndSlope found = silu_and_slope(g, T{});
          store(out + i, v * load(gate + n + i, part) * found.slope, part);
          store(out + n + i, v * round_to<T>(found.silu), part);
        });
      }
    });
  });
  return dgate_up;
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}
