// The kernels of rms_norm and add_rms_norm, one block a row.
//
//   forward    s = round(x + residual) or x,  y = round(round(s * rstd) * weight)
//   backward   z = x * rstd, dz = dy * weight:
//              dx = rstd * (dz - z * mean(dz * z)) + extra,  dweight = sum of dy * round(z)
//
// They are for few rows: the time is that of the launch and of the way through one row. A thread
// has one 16-byte vector of the row. Its loads and the weight's are all under way before the one
// barrier, and nothing is compiled at run time. Columns past one vector a thread (8192 of a half
// type, 4096 of float forward; half of those backward) are read twice. Not measured on a GPU.
#pragma once

#include "cuda/partials.cuh"

// A backward block of more would spill registers; the 1 in its bounds lets the compiler use 128.
constexpr int kBackwardThreads = kMaxThreads / 2;

template <int N, bool ADD, class T>
__device__ __forceinline__ void load_sum(float (&s)[N], const T* x, const T* residual, T* total) {
  load(s, x);
  if constexpr (ADD) {
    float r[N];
    load(r, residual);
#pragma unroll
    for (int j = 0; j < N; ++j) s[j] = rounded<T>(s[j] + r[j]);
    store(total, s);
  }
}

template <class T, int N>
__device__ __forceinline__ void store_normed(T* y, const float (&s)[N], const float (&w)[N],
                                             float rstd) {
  float out[N];
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = rounded<T>(s[j] * rstd) * w[j];
  store(y, out);
}

template <int N>
__device__ __forceinline__ float squares(const float (&s)[N], float sum) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum += s[j] * s[j];
  return sum;
}

template <int N>
__device__ __forceinline__ float products(const float (&a)[N], const float (&b)[N],
                                          const float (&c)[N], float sum) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum += a[j] * b[j] * c[j];
  return sum;
}

struct Norm {
  int64_t rows, n;
  float eps;
};

// N: columns of a vector. ADD: there is a residual, and `total` receives the sum.
template <class T, class W, int N, bool ADD>
__global__ void __launch_bounds__(kMaxThreads)
    norm_fwd(Rows x, Rows residual, const W* weight, T* y, T* total, Norm norm) {
  const auto [rows, n, eps] = norm;
  __shared__ float2 shared[2][kLanes];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const T* in = x.at<T>(row);
    const T* in2 = ADD ? residual.at<T>(row) : in;
    T* out = y + row * n;
    T* out2 = ADD ? total + row * n : out;
    float kept[N] = {}, w[N] = {};
    float sum = 0.0f;
    if (first < n) {
      load(w, weight + first);
      load_sum<N, ADD>(kept, in + first, in2 + first, out2 + first);
      sum = squares(kept, sum);
    }
#pragma unroll 1
    for (int64_t c = first + step; c < n; c += step) {
      float s[N];
      load_sum<N, ADD>(s, in + c, in2 + c, out2 + c);
      sum = squares(s, sum);
    }
    const float rstd = rsqrtf(block_sum(sum, 0.0f, shared[turn]).x / static_cast<float>(n) + eps);
    if (first < n) store_normed(out + first, kept, w, rstd);
#pragma unroll 1
    for (int64_t c = first + step; c < n; c += step) {
      load(w, weight + c);
      load(kept, ADD ? out2 + c : in + c);  // its own store, or the input again
      store_normed(out + c, kept, w, rstd);
    }
  }
}

// One vector's share of dx, and its term of dweight in `dw`.
template <class T, int N, bool EXTRA>
__device__ __forceinline__ void norm_bwd_vector(T* dx, const T* extra, const float (&x)[N],
                                                const float (&dy)[N], const float (&w)[N],
                                                float (&dw)[N], float rstd, float mean) {
  float e[N], out[N];
  if constexpr (EXTRA) load(e, extra);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float z = x[j] * rstd;
    dw[j] += dy[j] * rounded<T>(z);
    out[j] = rstd * (dy[j] * w[j] - z * mean);
    if constexpr (EXTRA) out[j] += e[j];
  }
  store(dx, out);
}

// Each block takes every gridDim.x-th row and leaves its sum of dweight in its row of `partial`.
template <class T, class W, int N, bool EXTRA>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    norm_bwd(Rows dy, Rows x, Rows extra, const W* weight, T* dx, float* partial, Norm norm) {
  const auto [rows, n, eps] = norm;
  __shared__ float2 shared[2][kLanes];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  partial += blockIdx.x * n;
  float kept_dw[N] = {};
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const T* in = x.at<T>(row);
    const T* grad = dy.at<T>(row);
    const T* more = EXTRA ? extra.at<T>(row) : grad;
    T* out = dx + row * n;
    float a[N] = {}, g[N] = {}, w[N] = {};
    float sum = 0.0f, dots = 0.0f;
    if (first < n) {
      load(a, in + first);
      load(g, grad + first);
      load(w, weight + first);
      sum = squares(a, sum);
      dots = products(a, g, w, dots);
    }
#pragma unroll 1
    for (int64_t c = first + step; c < n; c += step) {
      float ai[N], gi[N], wi[N];
      load(ai, in + c);
      load(gi, grad + c);
      load(wi, weight + c);
      sum = squares(ai, sum);
      dots = products(ai, gi, wi, dots);
    }
    const float2 sums = block_sum(sum, dots, shared[turn]);
    const float rstd = rsqrtf(sums.x / static_cast<float>(n) + eps);
    const float mean = sums.y * rstd / static_cast<float>(n);
    if (first < n) {
      norm_bwd_vector<T, N, EXTRA>(out + first, more + first, a, g, w, kept_dw, rstd, mean);
    }
    // Columns of wider rows: their sums live in `partial`, which no other thread touches.
#pragma unroll 1
    for (int64_t c = first + step; c < n; c += step) {
      float dw[N] = {};
      if (row != blockIdx.x) load(dw, partial + c);
      load(a, in + c);
      load(g, grad + c);
      load(w, weight + c);
      norm_bwd_vector<T, N, EXTRA>(out + c, more + c, a, g, w, dw, rstd, mean);
      store(partial + c, dw);
    }
  }
  if (first < n) store(partial + first, kept_dw);
}

// fn(N) with N columns to a vector: 16 bytes if n and every address divide by them, else one.
template <class T, class Fn>
void with_vector(bool whole, Fn&& fn) {
  if (whole) {
    fn(std::integral_constant<int, kBytes / sizeof(T)>{});
  } else {
    fn(std::integral_constant<int, 1>{});
  }
}

inline bool whole_vectors(int64_t n, int64_t element_size, const Tensor& weight,
                          std::initializer_list<const Rows*> all) {
  bool found = n * element_size % kBytes == 0 && aligned(weight);
  for (const Rows* rows : all) found = found && aligned(*rows, element_size, kBytes);
  return found;
}

// rms_norm(x), or with ADD rms_norm of x + residual, which `total` receives.
template <bool ADD>
void launch_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                     Tensor& y, Tensor& total) {
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_of(x);
  const Tensor contiguous_weight = as_contiguous(weight);
  const int64_t n = width_of(x);
  const Rows in(x), in2(residual);
  const Norm norm{in.count, n, static_cast<float>(eps)};
  const int64_t blocks = std::min<int64_t>(in.count, 1 << 30);
  with_dtypes(x, weight, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    with_vector<T>(whole_vectors(n, sizeof(T), contiguous_weight, {&in, &in2}), [&](auto size) {
      constexpr int N = decltype(size)::value;
      const int threads = threads_for((n + N - 1) / N, kMaxThreads);
      norm_fwd<T, W, N, ADD><<<blocks, threads, 0, stream>>>(
          in, in2, data<const W>(contiguous_weight), data<T>(y), data<T>(total), norm);
    });
  });
  check(cudaGetLastError(), "launching the norm");
}

// (dx, dweight) of rms_norm; with EXTRA, `extra` is the gradient that x has from elsewhere.
template <bool EXTRA>
std::tuple<Tensor, Tensor> launch_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& extra,
                                           const Tensor& weight, double eps) {
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return {dx, torch::stable::new_zeros(weight, weight.sizes())};
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_of(x);
  const Tensor contiguous_weight = as_contiguous(weight);
  const int64_t n = width_of(x);
  const Rows grad(dy), in(x), more(extra);
  const Norm norm{in.count, n, static_cast<float>(eps)};
  // Reasoned: one or two blocks of 512 threads fill a multiprocessor's registers.
  const int64_t blocks = std::min<int64_t>(in.count, 2 * multiprocessors(x));
  const int64_t shape[] = {blocks, n};
  Tensor partial = torch::stable::new_empty(x, {shape, 2}, ScalarType::Float);
  float* sums = data<float>(partial);
  with_dtypes(x, weight, [&](auto t, auto u) {
    using T = decltype(t);
    using W = decltype(u);
    with_vector<T>(whole_vectors(n, sizeof(T), contiguous_weight, {&grad, &in, &more}),
                   [&](auto size) {
                     constexpr int N = decltype(size)::value;
                     const int threads = threads_for((n + N - 1) / N, kBackwardThreads);
                     norm_bwd<T, W, N, EXTRA><<<blocks, threads, 0, stream>>>(
                         grad, in, more, data<const W>(contiguous_weight), data<T>(dx), sums, norm);
                   });
    launch_sum(sums, data<W>(dweight), blocks, n, stream);
  });
  check(cudaGetLastError(), "launching the norm's backward");
  return {dx, dweight};
}
