// The sum of the partial results of a weight's gradient, in an order that is always the same.
#pragma once

#include "cuda/common.cuh"

constexpr int kSumColumns = 32, kSumShares = 32;

// out[c] = sum of partial[p, c] over p: a warp has consecutive columns and one of kSumShares equal
// shares of the partials, so that many loads are under way; the shares are added in their order.
template <class W>
__global__ void __launch_bounds__(kSumColumns* kSumShares)
    sum_partials(const float* partial, W* out, int64_t partials, int64_t n) {
  __shared__ float sums[kSumShares][kSumColumns];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const int64_t first = partials * threadIdx.y / kSumShares;
  const int64_t last = partials * (threadIdx.y + 1) / kSumShares;
  float sum = 0.0f;
  if (c < n) {
#pragma unroll 8
    for (int64_t p = first; p < last; ++p) sum += partial[p * n + c];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= n) return;
#pragma unroll
  for (int share = 1; share < kSumShares; ++share) sum += sums[share][threadIdx.x];
  out[c] = narrow<W>(sum);
}

template <class W>
void launch_sum(const float* partial, W* out, int64_t partials, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t blocks = (n + kSumColumns - 1) / kSumColumns;
  sum_partials<W><<<blocks, dim3(kSumColumns, kSumShares), 0, stream>>>(partial, out, partials, n);
}
