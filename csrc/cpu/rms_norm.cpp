// rms_norm: 2 n elements moved a row forward (x, y), 3 n backward (dy, x, dx); each row is read
// from memory once and from L1 the second time.
#include "cpu/norm.h"
#include "cpu/op.h"

namespace {

Tensor rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps) {
  Tensor y = output_like(x);
  const Tensor w = as_contiguous(weight);
  with_dtypes(x, w, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    const Rows in(x);
    const int64_t n = width_of(x);
    T* out = data<T>(y);
    parallel_rows(in.count, n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = in.at<T>(r);
        norm_row(row, data<const W>(w), out + r * n, n, row_rstd(row, n, eps));
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                        double eps) {
  Tensor dx = output_like(x);
  Tensor dweight = output_like(weight);
  const Tensor w = as_contiguous(weight);
  with_dtypes(x, w, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    const Rows in(x), grad(dy);
    const int64_t n = width_of(x);
    RowSum total(in.count, n);
    total.run(n, [&](int64_t begin, int64_t end, float* partial) {
      for (int64_t r = begin; r < end; ++r)
        norm_row_backward<T, W>(grad.at<T>(r), nullptr, in.at<T>(r), data<const W>(w),
                                data<T>(dx) + r * n, partial, n, eps);
    });
    total.write(data<W>(dweight), 0, n);
  });
  return {dx, dweight};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}
