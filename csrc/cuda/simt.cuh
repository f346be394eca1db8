// Blocks and warps as sections: work for every thread, or for every warp, all of which ends before
// the next section begins. nvcc makes a thread's own part and a barrier of a section. A host
// compiler loops over the threads instead, so that the same sources run on both: it gets a stand-in
// (tests/cuda) for what __CUDACC__ has below.
#pragma once

#include "cuda/warp.h"
#include "shared/dtypes.h"

#if defined(__CUDACC__)
#include "cuda/common.cuh"
#define DEVICE_INLINE __device__ __forceinline__
// A function that stays one: its registers are its own, and it is compiled once.
#define DEVICE_CALL __device__ __noinline__
#elif defined(SIMT_ON_HOST)
#define DEVICE_INLINE inline
#define DEVICE_CALL inline
#else
#error "a host compiler needs a stand-in for a GPU first"
#endif

namespace simt {

#if defined(__CUDACC__)

DEVICE_INLINE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DEVICE_INLINE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE_INLINE float half_of(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE_INLINE float inverse_root(float x) { return rsqrtf(x); }
// a b + c with two roundings.
DEVICE_INLINE float twice_rounded(float a, float b, float c) {
  return __fadd_rn(__fmul_rn(a, b), c);
}

template <int N, class T>
DEVICE_INLINE Vector<T, N> vector_at(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

// For what another block wrote in this launch: it reads past the first-level caches.
template <class T>
DEVICE_INLINE T fresh(const T* p) {
  return __ldcg(p);
}

// Weights: each byte is needed once, by one multiprocessor.
DEVICE_INLINE void load_once(uint32_t (&w)[4], const uint8_t* from) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
      : "l"(from));
}
DEVICE_INLINE void load_once(uint32_t (&w)[2], const uint8_t* from) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
      : "=r"(w[0]), "=r"(w[1])
      : "l"(from));
}
DEVICE_INLINE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <class X>
struct PerLane {
  X own;
  DEVICE_INLINE X& operator[](int) { return own; }
};

struct Warp {
  int index;

  template <class Fn>
  DEVICE_INLINE void each(Fn&& fn) {
    fn(static_cast<int>(threadIdx.x) % kLanes);
  }
  // Sums within every `Width` neighbours, to all of them.
  template <int Width, int N>
  DEVICE_INLINE void sum(PerLane<Floats<N>>& x) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) x.own.v[i] += __shfl_xor_sync(0xffffffff, x.own.v[i], step);
  }
  DEVICE_INLINE void maximum(PerLane<Floats<1>>& x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2)
      x.own.v[0] = fmaxf(x.own.v[0], __shfl_xor_sync(0xffffffff, x.own.v[0], step));
  }
  DEVICE_INLINE void maximum(PerLane<uint64_t>& x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffff, x.own, step);
      x.own = x.own > other ? x.own : other;
    }
  }
};

struct Block {
  int index;

  // Named here and not handed on, so that the compiler knows what kind of memory it is.
  DEVICE_INLINE uint8_t* shared() const {
    extern __shared__ __align__(16) uint8_t memory[];
    return memory;
  }
  template <class Fn>
  DEVICE_INLINE void threads(Fn&& fn) {
    fn(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class Fn>
  DEVICE_INLINE void warps(Fn&& fn) {
    fn(Warp{static_cast<int>(threadIdx.x) / kLanes});
    __syncthreads();
  }
  // Whether this block is the last of `expected` to come here; then it sees what all wrote before,
  // and the count is zero again.
  DEVICE_INLINE bool last_of(uint32_t* count, uint32_t expected) {
    __shared__ uint32_t before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(count, 1u);
    __syncthreads();
    const bool last = before + 1 == expected;
    if (last) {
      __threadfence();
      if (threadIdx.x == 0) *count = 0;
    }
    return last;
  }
};

#endif

DEVICE_INLINE float bf16_low(uint32_t pair) { return float_of(pair << 16); }
DEVICE_INLINE float bf16_high(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// `bytes` bytes from anywhere, zeros behind them.
template <int N>
DEVICE_INLINE void load_piece(uint32_t (&w)[N], const uint8_t* from, int64_t bytes) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    w[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (4 * i + j < bytes) w[i] |= static_cast<uint32_t>(from[4 * i + j]) << 8 * j;
  }
}

}  // namespace simt
