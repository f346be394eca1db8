// A stand-in for a GPU: what csrc/cuda/simt.cuh needs, on a host. Half types are bits, and a
// block's threads run one after the other. The compiler includes it first (on_host.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda/warp.h"
#include "shared/dtypes.h"

#define SIMT_ON_HOST

namespace simt {

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float half_of(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}
inline float wide(float x) { return x; }
inline float wide(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float wide(fp16 x) { return half_of(x.bits); }

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 narrow<fp16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units))};
}
template <class T>
inline float rounded(float x) {
  return wide(narrow<T>(x));
}
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float twice_rounded(float a, float b, float c) { return a * b + c; }

// Whether neighbours were loaded or stored at once at an address that a GPU can't do it at.
inline bool misaligned = false;
template <int N, class T>
inline void note(const T* p) {
  misaligned |= reinterpret_cast<uintptr_t>(p) % std::min<size_t>(16, N * sizeof(T)) != 0;
}
template <class T, int N>
struct Vector {
  T v[N];
};
template <int N, class T>
inline Vector<T, N> vector_at(const T* from) {
  note<N>(from);
  Vector<T, N> vector;
  std::copy(from, from + N, vector.v);
  return vector;
}
template <int N, class T>
inline void load(float (&out)[N], const T* from) {
  note<N>(from);
  for (int j = 0; j < N; ++j) out[j] = wide(from[j]);
}
template <int N, class T>
inline void store(T* to, const float (&values)[N]) {
  note<N>(to);
  for (int j = 0; j < N; ++j) to[j] = narrow<T>(values[j]);
}
template <class T>
inline T fresh(const T* p) {
  return *p;
}
template <int N>
inline void load_once(uint32_t (&w)[N], const uint8_t* from) {
  std::memcpy(w, from, sizeof(w));
}
// It reads the byte, so that a checker of addresses shows one outside of a weight.
inline void prefetch(const void* p) { (void)*static_cast<const volatile uint8_t*>(p); }

template <class X>
struct PerLane {
  X all[kLanes];
  X& operator[](int lane) { return all[lane]; }
};

struct Warp {
  int index;

  template <class Fn>
  void each(Fn&& fn) {
    for (int lane = 0; lane < kLanes; ++lane) fn(lane);
  }
  template <int Width, int N>
  void sum(PerLane<Floats<N>>& x) {
    exchange<Width>(x, [](float a, float b) { return a + b; });
  }
  void maximum(PerLane<Floats<1>>& x) {
    exchange<kLanes>(x, [](float a, float b) { return std::fmax(a, b); });
  }
  void maximum(PerLane<uint64_t>& x) {
    const uint64_t best = *std::max_element(x.all, x.all + kLanes);
    std::fill(x.all, x.all + kLanes, best);
  }

 private:
  template <int Width, int N, class Fn>
  void exchange(PerLane<Floats<N>>& x, Fn&& fn) {
    for (int step = Width / 2; step > 0; step /= 2) {
      const PerLane<Floats<N>> before = x;
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < N; ++i)
          x.all[lane].v[i] = fn(before.all[lane].v[i], before.all[lane ^ step].v[i]);
    }
  }
};

struct Block {
  int index, size;  // its threads
  uint8_t* memory;
  bool reversed = false;  // threads and warps run from the last to the first

  uint8_t* shared() const { return memory; }

  template <class Fn>
  void threads(Fn&& fn) {
    for (int i = 0; i < size; ++i) fn(reversed ? size - 1 - i : i);
  }
  template <class Fn>
  void warps(Fn&& fn) {
    const int warps = size / kLanes;
    for (int i = 0; i < warps; ++i) fn(Warp{reversed ? warps - 1 - i : i});
  }
  bool last_of(uint32_t* count, uint32_t expected) {
    const bool last = ++*count == expected;
    if (last) *count = 0;
    return last;
  }
};

}  // namespace simt
