// add_rms_norm: 4 n elements moved a row forward (x, residual, sum, normed), 4 n backward
// (dnormed, dsum, sum, dx).
#include "cpu/norm.h"
#include "cpu/op.h"

namespace {

std::tuple<Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                            const Tensor& weight, double eps) {
  Tensor normed = output_like(x);
  Tensor total = output_like(x);
  const Tensor w = as_contiguous(weight);
  with_dtypes(x, w, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    const Rows a(x), b(residual);
    const int64_t n = width_of(x);
    parallel_rows(a.count, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* left = a.at<T>(r);
        const T* right = b.at<T>(r);
        T* out = data<T>(total) + r * n;
        float sums[1];
        sweep_sums(n, sums, [&](int64_t i, auto part, Vec* acc) {
          const Vec s = round_to<T>(load(left + i, part) + load(right + i, part));
          store(out + i, s, part);
          acc[0] = fma(s, s, acc[0]);
        });
        norm_row<T, W>(out, data<const W>(w), data<T>(normed) + r * n, n, rstd_of(sums[0], n, eps));
      }
    });
  });
  return {normed, total};
}

std::tuple<Tensor, Tensor> add_rms_norm_bwd(const Tensor& dnormed, std::optional<Tensor> dsum,
                                            const Tensor& sum, const Tensor& weight, double eps) {
  Tensor dx = output_like(sum);
  Tensor dweight = output_like(weight);
  const Tensor w = as_contiguous(weight);
  with_dtypes(sum, w, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    const Rows in(sum), grad(dnormed), direct(dsum ? *dsum : dnormed);
    const int64_t n = width_of(sum);
    RowSum total(in.count, n);
    total.run(n, [&](int64_t begin, int64_t end, float* partial) {
      for (int64_t r = begin; r < end; ++r)
        norm_row_backward<T, W>(grad.at<T>(r), dsum ? direct.at<T>(r) : nullptr, in.at<T>(r),
                                data<const W>(w), data<T>(dx) + r * n, partial, n, eps);
    });
    total.write(data<W>(dweight), 0, n);
  });
  return {dx, dweight};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&add_rms_norm_bwd));
}
