// A block as sections: work for every thread or for every warp, with all of it done before the
// next begins. nvcc makes of them a thread's own part and a barrier; a host compiler loops over the
// threads instead, so that the same sources run on both.
#pragma once

#include "decode_plan.cuh"

#if defined(__CUDACC__)
#include "common.cuh"
#define DECODE_DEVICE __device__ __forceinline__
// A function that stays one: its registers are its own, and it is compiled once.
#define DECODE_CALL __device__ __noinline__
#else
#include "decode_host.h"
#define DECODE_DEVICE inline
#define DECODE_CALL inline
#endif

namespace decode {

template <int N>
struct Floats {
  float v[N];
};

#if defined(__CUDACC__)

using bf16 = __nv_bfloat16;
using fp16 = __half;

DECODE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DECODE_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DECODE_DEVICE float half_of(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DECODE_DEVICE float inverse_root(float x) { return rsqrtf(x); }
// a b + c with two roundings.
DECODE_DEVICE float twice_rounded(float a, float b, float c) {
  return __fadd_rn(__fmul_rn(a, b), c);
}

template <int N, class T>
DECODE_DEVICE Pack<T, N> pack_at(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// What another block wrote in this launch: the first-level caches don't know of it.
template <class T>
DECODE_DEVICE T fresh(const T* p) {
  return __ldcg(p);
}

// Weights: each byte is needed once, by one multiprocessor.
DECODE_DEVICE void load_once(uint32_t (&w)[4], const uint8_t* from) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
      : "l"(from));
}
DECODE_DEVICE void load_once(uint32_t (&w)[2], const uint8_t* from) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
      : "=r"(w[0]), "=r"(w[1])
      : "l"(from));
}
DECODE_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <class X>
struct PerLane {
  X own;
  DECODE_DEVICE X& operator[](int) { return own; }
};

struct Warp {
  int index;

  template <class Fn>
  DECODE_DEVICE void each(Fn&& fn) {
    fn(static_cast<int>(threadIdx.x) % kLanes);
  }
  // Sums within every `Width` neighbours, to all of them.
  template <int Width, int N>
  DECODE_DEVICE void sum(PerLane<Floats<N>>& x) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) x.own.v[i] += __shfl_xor_sync(0xffffffff, x.own.v[i], step);
  }
  DECODE_DEVICE void maximum(PerLane<Floats<1>>& x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2)
      x.own.v[0] = fmaxf(x.own.v[0], __shfl_xor_sync(0xffffffff, x.own.v[0], step));
  }
  DECODE_DEVICE void maximum(PerLane<uint64_t>& x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2)
      x.own = greater(x.own, __shfl_xor_sync(0xffffffff, x.own, step));
  }
};

struct Block {
  int index;

  // Named here and not handed on, so that the compiler knows what kind of memory it is.
  DECODE_DEVICE uint8_t* shared() const {
    extern __shared__ __align__(16) uint8_t memory[];
    return memory;
  }
  template <class Fn>
  DECODE_DEVICE void threads(Fn&& fn) {
    fn(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class Fn>
  DECODE_DEVICE void warps(Fn&& fn) {
    fn(Warp{static_cast<int>(threadIdx.x) / kLanes});
    __syncthreads();
  }
  // Whether this block is the last of `expected` to come here; then it sees what all wrote before,
  // and the count is zero again.
  DECODE_DEVICE bool last_of(uint32_t* count, uint32_t expected) {
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

DECODE_DEVICE float bf16_low(uint32_t pair) { return float_of(pair << 16); }
DECODE_DEVICE float bf16_high(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// The bytes of a chunk that isn't aligned, or that is the end of a row: zeros beyond `bytes`.
template <int N>
DECODE_DEVICE void load_piece(uint32_t (&w)[N], const uint8_t* from, int64_t bytes) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    w[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (4 * i + j < bytes) w[i] |= static_cast<uint32_t>(from[4 * i + j]) << 8 * j;
  }
}

// N inputs from a column on that is a multiple of N, out of a row that input_place() laid out.
template <int N, class T>
DECODE_DEVICE void inputs(const T* x, int column, float (&out)[N]) {
  constexpr int kPer = 16 / sizeof(T);
  constexpr int kSlots = N < kPer ? 1 : N / kPer;
  static_assert(N % kPer == 0);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    float part[kPer];
    load(part, x + slot_place<T>(column / kPer + i));
#pragma unroll
    for (int j = 0; j < kPer; ++j) out[i * kPer + j] = part[j];
  }
}

}  // namespace decode
