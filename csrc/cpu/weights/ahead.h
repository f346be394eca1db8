// How far ahead of itself a stream of weights asks for memory: a row for each instruction set, with
// where it was measured. The processor's own prefetching stops at a page's end.
#pragma once

#include <cstdint>

#include "cpu/simd/vec.h"

struct Distances {
  int64_t weights;  // bytes; into L2
  int64_t scales;   // bytes; into L1: two more streams, of a line every other row
  int64_t next;     // bytes of the weight of the next stage, before a thread waits; into L2
  int64_t several;  // bytes, if many activations share a pass; into L2
};

#if defined(__AVX512BF16__)
// AMD EPYC (Zen 4, 2 cores), rows of 1280 and 5120 columns in memory, two threads: weights at 1, 2,
// 4, 8 and 16 KB into L1 and L2, scales at 512 and 1024 bytes; on a busy machine.
// `next` wasn't measured; `several` at 15, 46 and 123 KB with 16 activations, in large pages.
constexpr Distances kDistances{4096, 512, 8192, 65536};
#elif defined(__AVX512F__)
constexpr Distances kDistances{4096, 512, 8192, 65536};  // not measured: as above
#else
constexpr Distances kDistances{4096, 512, 8192, 65536};  // not measured: as above
#endif

// Nibbles gain most, bfloat16 gains a little. Segments of packed12 were slower and go without.
template <class T>
inline void prefetch_weights(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kDistances.weights, _MM_HINT_T1);
}

// Of one row of scales and biases.
template <class S>
inline void prefetch_scales(const S* scales, const S* biases, int64_t groups) {
  for (int64_t i = 0; i < groups; i += 64 / sizeof(S)) {
    _mm_prefetch(reinterpret_cast<const char*>(scales + i) + kDistances.scales, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(biases + i) + kDistances.scales, _MM_HINT_T0);
  }
}
