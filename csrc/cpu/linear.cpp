// linear: few rows of activations against a weight in any form, whose bytes are read once; and the
// dense matrix that a compressed weight stands for.
#include "cpu/op.h"
#include "cpu/weights/dense.h"
#include "cpu/weights/parts.h"
#include "cpu/weights/several.h"
#include "cpu/weights/stream.h"

namespace {

// Whether a weight's bytes are read once for up to kSeveral rows, not for each kMaxBatch of them.
template <class T>
int64_t most_at_once(const Weight& w, int64_t batch) {
#if defined(__AVX512BF16__)
  if (std::is_same_v<T, bf16> && w.form == Form::BFloat16 && batch > kMaxBatch) return kSeveral;
#endif
  return kMaxBatch;
}

// stream() of up to most_at_once() rows.
template <class T>
void stream_any(const Weight& w, int batch, const Activation* x, int64_t begin, int64_t end,
                float* out, int64_t stride) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    if (batch > kMaxBatch) return stream_several(w, batch, x, begin, end, out, stride);
#endif
  stream<T>(w, batch, x, begin, end, out, stride);
}

Tensor product(const Tensor& x, const Weight& w) {
  const Rows in(x);
  const int64_t batch = in.count, k = w.k;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = w.n;
  Tensor y = output(x, sizes);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    T* out = ::data<T>(y);
    const int64_t most = most_at_once<T>(w, batch);
    parallel_rows(w.n, k, [&](int64_t begin, int64_t end) {
      Activations room(std::min(most, round_up(batch, kMaxBatch)), w);
      // Rows of the weight whose floats wait in a cache for their rounding.
      const int64_t block = most > kMaxBatch ? 96 : 256;
      float sums[64 * 96];
      for (int64_t first = 0; first < batch; first += most) {
        const int64_t count = std::min(most, batch - first);
        const int compiled = count > kMaxBatch ? static_cast<int>(count) : compiled_batch(count);
        for (int64_t b = 0; b < compiled; ++b)
          arrange(w, in.at<T>(first + std::min(b, count - 1)), room.rows[b]);
        for (int64_t r = begin; r < end; r += block) {
          const int64_t rows = std::min(block, end - r);
          stream_any<T>(w, static_cast<int>(count), room.rows.data(), r, r + rows, sums, block);
          for (int64_t b = 0; b < count; ++b)
            sweep(rows, [&](int64_t i, auto part) {
              store(out + (first + b) * w.n + r + i, load(sums + b * block + i, part), part);
            });
        }
      }
    });
  });
  return y;
}

Tensor linear_fwd(const Tensor& x, const Tensor& data, Optional scales, Optional biases,
                  Optional exponents, Optional starts, Optional columns, Optional values,
                  int64_t bits) {
  return product(x, WeightParts{data, scales, biases, exponents, starts, columns, values, bits}
                        .weight(width_of(x)));
}

// Of x rounded to 8 bits, with an affine weight.
Tensor linear_int8(const Tensor& x, const Tensor& data, Optional scales, Optional biases,
                   Optional exponents, Optional starts, Optional columns, Optional values,
                   int64_t bits) {
  Weight w = WeightParts{data, scales, biases, exponents, starts, columns, values, bits}.weight(
      width_of(x));
  w.form = bits == 8 ? Form::Affine8Int8 : Form::Affine4Int8;
  return product(x, w);
}

// Rows [begin, end) in `like`'s dtype, which is bfloat16 for packed12.
Tensor linear_dense(const Tensor& like, const Tensor& data, Optional scales, Optional biases,
                    Optional exponents, Optional starts, Optional columns, Optional values,
                    int64_t bits, int64_t k, int64_t begin, int64_t end) {
  const Weight w =
      WeightParts{data, scales, biases, exponents, starts, columns, values, bits}.weight(k);
  Tensor y = output(like, {end - begin, k});
  with_dtype(like, [&](auto t) {
    using T = decltype(t);
    T* out = ::data<T>(y);
    parallel_rows(end - begin, k, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) dense_row(w, begin + r, out + r * k);
    });
  });
  return y;
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_dense", TORCH_BOX(&linear_dense));
}
