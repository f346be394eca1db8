// HOST_DEVICE marks an inline function that nvcc compiles for the host and for the GPU. Any other
// compiler takes it as an inline function of the host.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif
