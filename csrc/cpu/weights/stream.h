// Products of few rows of activations with a weight that streams from memory, each byte of it once
// (_stream.cpp). It is compiled on its own, for all ops that use it.
#pragma once

#include "cpu/weights/arrange.h"

// Up to this many rows of activations share one pass over the weight.
constexpr int kMaxBatch = 8;
// A batch is rounded up to one that is compiled, for most forms: the rows added are computed for
// nothing.
inline int compiled_batch(int64_t batch) {
  return batch <= 2 ? static_cast<int>(batch) : batch <= 4 ? 4 : 8;
}

// out[b * stride + r - begin] = row r of w times activation b of type T, for rows [begin, end).
// x and out have compiled_batch(batch) rows.
template <class T>
void stream(const Weight& w, int batch, const Activation* x, int64_t begin, int64_t end, float* out,
            int64_t stride);

extern template void stream<float>(const Weight&, int, const Activation*, int64_t, int64_t, float*,
                                   int64_t);
extern template void stream<bf16>(const Weight&, int, const Activation*, int64_t, int64_t, float*,
                                  int64_t);
extern template void stream<fp16>(const Weight&, int, const Activation*, int64_t, int64_t, float*,
                                  int64_t);
