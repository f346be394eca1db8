// The only torch boundary of the CPU kernels: rows of tensors, dtypes, threads, registration.
// Kernels trust their caller (elmkernels/ops validates); only data-dependent errors are raised
// here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "vec.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work below this many elements isn't worth waking a second thread for.
constexpr int64_t kGrain = 32768;

// The rows of an N-dimensional tensor with a packed last dimension: its leading dimensions,
// merged where their strides allow.
template <class T>
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : data_(static_cast<T*>(x.data_ptr())), width(x.size(x.dim() - 1)), count(1) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      count *= sizes[d];
      if (sizes[d] == 1) continue;
      if (dims_ > 0 && strides[d] == stride_[dims_ - 1] * size_[dims_ - 1]) {
        size_[dims_ - 1] *= sizes[d];
        continue;
      }
      STD_TORCH_CHECK(dims_ < kMaxDims, "a tensor must have at most ", kMaxDims,
                      " unmergeable leading dimensions");
      size_[dims_] = sizes[d];
      stride_[dims_++] = strides[d];
    }
  }

  T* operator[](int64_t row) const {
    if (dims_ == 1) return data_ + row * stride_[0];
    int64_t offset = 0;
    for (int d = 0; d < dims_; ++d) {
      offset += (row % size_[d]) * stride_[d];
      row /= size_[d];
    }
    return data_ + offset;
  }

 private:
  static constexpr int kMaxDims = 8;
  T* data_;
  int dims_ = 0;
  int64_t size_[kMaxDims], stride_[kMaxDims];

 public:
  const int64_t width;
  int64_t count;
};

inline ScalarType dtype_of(const Tensor& x) { return x.scalar_type(); }

// fn(T{}) for the element type of x.
template <class Fn>
inline void with_dtype(const Tensor& x, Fn&& fn) {
  switch (dtype_of(x)) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::BFloat16: return fn(bf16{});
    case ScalarType::Half: return fn(fp16{});
    default: STD_TORCH_CHECK(false, "the CPU kernels take float32, bfloat16 and float16");
  }
}

// fn(T{}, W{}) for the element types of x and of a weight, which is T or float.
template <class Fn>
inline void with_dtypes(const Tensor& x, const Tensor& weight, Fn&& fn) {
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    if (dtype_of(weight) == ScalarType::Float) {
      fn(T{}, float{});
    } else {
      fn(T{}, T{});
    }
  });
}

inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// A contiguous tensor of other sizes in x's dtype.
inline Tensor output(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, {sizes.data(), sizes.size()});
}
inline Tensor output_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

// body(begin, end) over rows, on torch's own thread pool. Outputs are stored through the caches:
// streaming stores were tried and mostly lost, the more where the allocator hands out fresh pages.
template <class Body>
inline void parallel_rows(int64_t rows, int64_t elements_per_row, Body&& body) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
  if (rows <= grain) return body(int64_t{0}, rows);
  torch::stable::parallel_for(0, rows, grain, body);
}

// body(next) on every thread: next() hands out the items in turn, then -1. For items of unlike
// cost, the dearest first. Fewer than `worth` operations stay on this thread.
template <class Body>
inline void parallel_queue(int64_t items, int64_t operations, int64_t worth, Body&& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < items ? item : -1;
  };
  const int64_t threads =
      operations < worth ? 1 : std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads <= 1) return body(next);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) body(next);
  });
}

// Floats that nobody has written yet, from a cache line on.
struct Free {
  void operator()(float* p) const { std::free(p); }
};
inline std::unique_ptr<float[], Free> floats(int64_t count) {
  const size_t bytes = static_cast<size_t>((count + 15) / 16 * 64);
  return std::unique_ptr<float[], Free>(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

// A sum over rows, in an order that depends on nothing but the shape: blocks of rows into float
// partials (body(begin, end, partial)), then the partials in turn. At most 256 of them.
class RowSum {
 public:
  RowSum(int64_t rows, int64_t n)
      : rows_(rows),
        n_(n),
        block_(std::max<int64_t>(64, (rows + 255) / 256)),
        blocks_((rows + block_ - 1) / block_),
        partials_(static_cast<size_t>(blocks_ * n), 0.0f) {}

  template <class Body>
  void run(int64_t elements_per_row, Body&& body) {
    parallel_rows(blocks_, elements_per_row * block_, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        body(b * block_, std::min(rows_, (b + 1) * block_), partials_.data() + b * n_);
    });
  }

  // Writes columns [first, first + count) of the total.
  template <class W>
  void write(W* out, int64_t first, int64_t count) const {
    sweep(count, [&](int64_t i, auto part) {
      Vec total = vec(0.0f);
      for (int64_t b = 0; b < blocks_; ++b)
        total = total + load(partials_.data() + b * n_ + first + i, part);
      store(out + i, total, part);
    });
  }

 private:
  int64_t rows_, n_, block_, blocks_;
  std::vector<float> partials_;
};

template <class T>
inline T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// ELMKERNELS_BACKEND is the library's name in setup.py's table: elmkernels_avx2, ...
#define ELMKERNELS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL_(ELMKERNELS_BACKEND, CPU, m)
#define STABLE_TORCH_LIBRARY_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
