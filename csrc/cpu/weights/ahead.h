// How far ahead of itself a stream of weights asks for memory: a row for each instruction set, with
// where it was measured. The processor's own prefetching stops at a page's end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/vec.h"
#include "shared/weight_table.h"

struct Distances {
  int64_t weights;  // bytes; into L2
  int64_t scales;   // bytes; into L1: two more streams, of a line every other row
  int64_t next;     // bytes of the weight of the next stage, at most, while a thread waits; into L2
  int64_t several;  // bytes, if many activations share a pass; into L2
};

#if defined(__AVX512BF16__)
// AMD EPYC (Zen 4, 2 cores), two threads: weights at 2, 4, 8 and 16 KB in decode_step of 270M with
// 4 and 8 bits, where 8 KB had the best rounds of a busy machine; scales at 512 and 1024 bytes in
// rows of 1280 and 5120 columns. `next` at 8, 16 and 64 KB differed by less than the rounds did.
// `several` at 15, 46 and 123 KB with 16 activations, in large pages.
constexpr Distances kDistances{8192, 512, 32768, 65536};
#elif defined(__AVX512F__)
constexpr Distances kDistances{8192, 512, 32768, 65536};  // not measured: as above
#else
constexpr Distances kDistances{8192, 512, 32768, 65536};  // not measured: as above
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

// The beginning of what comes next, asked for while there is nothing else to do: the memory works
// on while threads wait for each other, normalize and arrange.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const uint8_t* begin, int64_t bytes) : at_(begin), end_(begin + bytes) {}

  void scales_of(const Weight& w, int64_t row) const {
    const int64_t bytes = w.groups() * (w.element == Element::Float ? 4 : 2);
    for (const uint8_t* p : {w.scales, w.biases})
      prefetch(p + row * bytes, kDistances.scales);
  }

  // Much of it at first, then a few lines a turn: whoever waits looks in between whether it still
  // has to.
  void fetch() {
    if (at_ >= end_) return _mm_pause();
    const int64_t bytes = std::min<int64_t>(turn_, end_ - at_);
    prefetch(at_, bytes);
    at_ += bytes;
    turn_ = 512;
  }

 private:
  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int64_t turn_ = 8192;
};
