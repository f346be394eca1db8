// torch as the kernels see it, through its stable ABI only: dtypes, rows of tensors, registration.
// The public ops in Python validate; kernels trust their caller.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "shared/dtypes.h"
#include "shared/host_device.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
inline T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// The size of the last dimension.
inline int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

// x itself if it is contiguous, else a contiguous copy. Never inlined, like all that is called once
// an op and holds much of torch: compiled again at each call it took a tenth of the build.
[[gnu::noinline]] inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

[[noreturn, gnu::noinline]] inline void refuse_dtype() {
  STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
  __builtin_unreachable();
}

// fn(T{}) for the element type of x.
template <class Fn>
inline void with_dtype(const Tensor& x, Fn&& fn) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::BFloat16: return fn(bf16{});
    case ScalarType::Half: return fn(fp16{});
    default: refuse_dtype();
  }
}

// fn(T{}, W{}) for the element types of x and of a weight, which is T or float.
template <class Fn>
inline void with_dtypes(const Tensor& x, const Tensor& weight, Fn&& fn) {
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    if (weight.scalar_type() == ScalarType::Float) {
      fn(T{}, float{});
    } else {
      fn(T{}, T{});
    }
  });
}

// The rows of a tensor of any number of dimensions whose last one has stride 1: its leading
// dimensions, merged if their strides allow it. CUDA kernels take it by value.
struct Rows {
  static constexpr int kMaxDims = 8;
  const void* data;
  int dims = 0;
  int64_t count = 1, size[kMaxDims], stride[kMaxDims];

  [[gnu::noinline]] explicit Rows(const Tensor& x) : data(x.data_ptr()) {
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

  template <class T>
  HOST_DEVICE const T* at(int64_t row) const {
    const T* start = static_cast<const T*>(data);
    if (dims == 1) return start + row * stride[0];
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int d = 0; d < dims; ++d) {
      start += row % size[d] * stride[d];
      row /= size[d];
    }
    return start;
  }
};

// ELMKERNELS_BACKEND is the library's name in setup.py: elmkernels_avx2, ..., elmkernels_cuda.
#if defined(__CUDACC__)
#define ELMKERNELS_IMPL(m) ELMKERNELS_IMPL_OF(ELMKERNELS_BACKEND, CUDA, m)
#else
#define ELMKERNELS_IMPL(m) ELMKERNELS_IMPL_OF(ELMKERNELS_BACKEND, CPU, m)
#endif
#define ELMKERNELS_IMPL_OF(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
