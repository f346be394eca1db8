// rms_norm on CUDA, for few rows: 2 n elements moved a row forward, 3 n backward.
#include "cuda/norm.cuh"

namespace {

Tensor rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps) {
  Tensor y = torch::stable::new_empty(x, x.sizes());
  launch_norm_fwd<false>(x, x, weight, eps, y, y);
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                        double eps) {
  return launch_norm_bwd<false>(dy, x, x, weight, eps);
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}
