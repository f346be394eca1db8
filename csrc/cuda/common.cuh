// What the CUDA kernels share: vectors of neighbours, sums over a block, the launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/warp.h"
#include "shared/tensors.h"

constexpr int kMaxThreads = 1024;
constexpr int kBytes = 16;  // the widest load of one thread

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(fp16 x) { return __half2float(x); }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// x after a rounding to T.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return wide(narrow<T>(x));
}

// N neighbours of one row, loaded by one instruction if they are up to kBytes bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < kBytes ? sizeof(T) * N : kBytes) Vector {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ void load(float (&out)[N], const T* from) {
  const auto vector = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = wide(vector.v[j]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int j = 0; j < N; ++j) vector.v[j] = narrow<T>(values[j]);
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

// The sums of a and of b over a block of whole warps, to every thread, behind one barrier. `shared`
// is one of two buffers that calls take in turn: the next call's barrier frees this one's.
__device__ __forceinline__ float2 block_sum(float a, float b, float2 (&shared)[kLanes]) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    a += __shfl_xor_sync(0xffffffff, a, lane);
    b += __shfl_xor_sync(0xffffffff, b, lane);
  }
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if (lane == 0) shared[threadIdx.x / kLanes] = make_float2(a, b);
  __syncthreads();
  float2 sum = lane < warps ? shared[lane] : make_float2(0.0f, 0.0f);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum.x += __shfl_xor_sync(0xffffffff, sum.x, step);
    sum.y += __shfl_xor_sync(0xffffffff, sum.y, step);
  }
  return sum;
}

// Whether every row starts on a boundary of `bytes`.
inline bool aligned(const Rows& rows, int64_t element_size, int64_t bytes) {
  bool found = reinterpret_cast<uintptr_t>(rows.data) % bytes == 0;
  for (int d = 0; d < rows.dims; ++d) found = found && rows.stride[d] * element_size % bytes == 0;
  return found;
}

inline bool aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % kBytes == 0;
}

// What the library was compiled for, as nvcc counts it: 800 is compute capability 8.0.
constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};

// Why there is no kernel for the current device.
inline std::string without_kernels() {
  const auto capability = [](int major, int minor) {
    return std::to_string(major) + "." + std::to_string(minor);
  };
  std::string built;
  for (const int arch : kArchitectures)
    built += (built.empty() ? "" : ", ") + capability(arch / 100, arch / 10 % 10);
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "the library was built for compute capability " + built +
         " (and what is later with the same first number), this device has " +
         capability(major, minor) +
         "; backend=\"reference\" doesn't need it, nor does \"triton\" where it has the op";
}

// An error is taken from the device too, so that nobody after this meets it once more.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const bool none =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  STD_TORCH_CHECK(false, what, ": ", none ? without_kernels() : cudaGetErrorString(error));
}

// The stream that torch would launch on for x. The caller holds a guard of x's device.
inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors(const Tensor& x) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index()),
        "counting multiprocessors");
  return count;
}

// Whole warps, a thread to each vector, as far as `most` threads go.
inline int threads_for(int64_t vectors, int most) {
  const int64_t warps = (vectors + kLanes - 1) / kLanes;
  return static_cast<int>(std::min<int64_t>(warps * kLanes, most));
}
