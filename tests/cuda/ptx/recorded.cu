// All CUDA sources as one, registered for tensors on a CPU: with the runtime of runtime.cpp their
// host code runs as it is, up to the launches.
#include "shared/tensors.h"

#undef ELMKERNELS_IMPL
#define ELMKERNELS_IMPL(m) ELMKERNELS_IMPL_OF(ELMKERNELS_BACKEND, CPU, m)

#include "cuda/add_rms_norm.cu"
#include "cuda/decode_step.cu"
#include "cuda/qk_norm_rope.cu"
#include "cuda/rms_norm.cu"
