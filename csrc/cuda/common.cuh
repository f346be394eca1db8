// What the CUDA kernels share: dtypes, vectors, sums over a block, rows of tensors, the launch.
// Kernels trust their caller (elmkernels/ops validates). torch only through its stable ABI.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kBytes = 16;  // the widest load of one thread

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// x after a rounding to T.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return wide(narrow<T>(x));
}

// N neighbours of one row, loaded as one instruction where their bytes allow.
template <class T, int N>
struct alignas(sizeof(T) * N < kBytes ? sizeof(T) * N : kBytes) Pack {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ void load(float (&out)[N], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = wide(pack.v[j]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.v[j] = narrow<T>(values[j]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// The sums of a and of b over a block of whole warps, to every thread, behind one barrier. `shared`
// is one of two buffers that calls take in turn: the next call's barrier frees this one's.
__device__ __forceinline__ float2 block_sum(float a, float b, float2 (&shared)[kWarp]) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    a += __shfl_xor_sync(0xffffffff, a, lane);
    b += __shfl_xor_sync(0xffffffff, b, lane);
  }
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) shared[threadIdx.x / kWarp] = make_float2(a, b);
  __syncthreads();
  float2 sum = lane < warps ? shared[lane] : make_float2(0.0f, 0.0f);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum.x += __shfl_xor_sync(0xffffffff, sum.x, step);
    sum.y += __shfl_xor_sync(0xffffffff, sum.y, step);
  }
  return sum;
}

// The rows of an N-dimensional tensor with a packed last dimension: its leading dimensions, merged
// where their strides allow. Passed to kernels by value.
struct Rows {
  static constexpr int kMaxDims = 8;
  const void* data;
  int dims = 0;
  int64_t count = 1, size[kMaxDims], stride[kMaxDims];

  explicit Rows(const Tensor& x) : data(x.data_ptr()) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      count *= sizes[d];
      if (sizes[d] == 1) continue;
      if (dims > 0 && strides[d] == stride[dims - 1] * size[dims - 1]) {
        size[dims - 1] *= sizes[d];
        continue;
      }
      STD_TORCH_CHECK(dims < kMaxDims, "a tensor must have at most ", kMaxDims,
                      " unmergeable leading dimensions");
      size[dims] = sizes[d];
      stride[dims++] = strides[d];
    }
  }

  // Whether every row starts on a boundary of `bytes`.
  bool aligned(int64_t element_size, int64_t bytes) const {
    bool found = reinterpret_cast<uintptr_t>(data) % bytes == 0;
    for (int d = 0; d < dims; ++d) found = found && stride[d] * element_size % bytes == 0;
    return found;
  }

  template <class T>
  __device__ __forceinline__ const T* at(int64_t row) const {
    const T* start = static_cast<const T*>(data);
    if (dims == 1) return start + row * stride[0];
#pragma unroll 1
    for (int d = 0; d < dims; ++d) {
      start += row % size[d] * stride[d];
      row /= size[d];
    }
    return start;
  }
};

inline bool aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % kBytes == 0;
}

inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// fn(T{}) for the element type of x.
template <class Fn>
void with_dtype(const Tensor& x, Fn&& fn) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::Half: return fn(__half{});
    case ScalarType::BFloat16: return fn(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16");
  }
}

// fn(T{}, W{}) for the element types of x and of a weight, which is T or float.
template <class Fn>
void with_dtypes(const Tensor& x, const Tensor& weight, Fn&& fn) {
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    if (weight.scalar_type() == ScalarType::Float) {
      fn(T{}, float{});
    } else {
      fn(T{}, T{});
    }
  });
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

// Whole warps, a thread to each pack, as far as `most` threads go.
inline int threads_for(int64_t packs, int most) {
  const int64_t warps = (packs + kWarp - 1) / kWarp;
  return static_cast<int>(std::min<int64_t>(warps * kWarp, most));
}

// ELMKERNELS_BACKEND is the library's name in setup.py: elmkernels_cuda.
#define ELMKERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL_(ELMKERNELS_BACKEND, CUDA, m)
#define STABLE_TORCH_LIBRARY_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
