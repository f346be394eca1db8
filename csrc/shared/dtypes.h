// The half types: nvcc's own, or their bits for a host compiler.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bf16 = __nv_bfloat16;
using fp16 = __half;

#else

#include <cstdint>

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#endif
