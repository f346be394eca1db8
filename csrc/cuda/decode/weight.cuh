// A weight in any of its forms as chunks of 16 or 24 bytes a lane: loading them, and the runs of
// neighbouring columns that they stand for.
#pragma once

#include "cuda/decode/plan.cuh"
#include "cuda/simt.cuh"

namespace decode {

using namespace simt;

DEVICE_INLINE float element_at(const uint8_t* data, int64_t i, Element element) {
  if (element == Element::Float) return reinterpret_cast<const float*>(data)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[i];
  return element == Element::BFloat16 ? float_of(static_cast<uint32_t>(bits) << 16) : half_of(bits);
}

// The words of a chunk are its bytes; of an affine form scale and bias come behind them. `run` is
// how many neighbouring columns one unpack() gives, `depth` how many chunks a lane loads before it
// needs the first of them: as many as its registers hold twice.
template <Form F>
struct Chunk {
  static constexpr bool affine = F == Form::Affine8 || F == Form::Affine4;
  static constexpr int words = affine || F == Form::Packed12 ? 6 : 4;
  static constexpr int columns = chunk_columns(F);
  static constexpr int run = F == Form::Float ? 4 : 8;
  static constexpr int runs = columns / run;
  static constexpr int depth = words == 4 ? 6 : 3;
  static constexpr int run_step = F == Form::Packed12 ? 64 : run;
  uint32_t w[words];
};

// How a weight's rows can be read: whole chunks as single loads, or byte by byte.
DEVICE_INLINE bool is_aligned(const Weight& w) {
  const int64_t bytes = w.form == Form::Packed12 ? 8 : 16;
  return (reinterpret_cast<uintptr_t>(w.data) | static_cast<uintptr_t>(w.row_bytes)) % bytes == 0;
}

template <Form F>
DEVICE_INLINE void load_chunk(Chunk<F>& chunk, const Weight& w, bool aligned, int64_t row,
                              int64_t unit, int lane) {
  const int64_t column = chunk_column(F, unit, lane);
  const uint8_t* data = w.row(row);
#pragma unroll
  for (int i = 0; i < Chunk<F>::words; ++i) chunk.w[i] = 0;
  if constexpr (F == Form::Packed12) {
    // Of a short last segment all bytes are there.
    if (column / kSegmentColumns * kSegmentColumns < w.k) {
      data += packed12_byte(unit, lane);
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        uint32_t two[2];
        if (aligned) {
          load_once(two, data + 64 * part);
        } else {
          load_piece(two, data + 64 * part, 8);
        }
        chunk.w[2 * part] = two[0];
        chunk.w[2 * part + 1] = two[1];
      }
    }
  } else {
    if (column >= w.k) return;
    constexpr int kColumns = Chunk<F>::columns;
    uint32_t four[4];
    if (aligned && column + kColumns <= w.k) {
      load_once(four, data + column * 16 / kColumns);
    } else {
      load_piece(four, data + column * 16 / kColumns, (w.k - column) * 16 / kColumns);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.w[i] = four[i];
    if constexpr (F == Form::Affine8 || F == Form::Affine4) {
      // q as 256 + q (16 + q of 4 bits): its bits below the leading one of a float. The bias makes
      // up for it, with no more rounding than scale q + bias has.
      const int64_t at = row * (w.k / w.group) + column / w.group;
      const float scale = element_at(w.scales, at, w.element);
      const float bias = element_at(w.biases, at, w.element);
      constexpr float kOne = F == Form::Affine8 ? 256.0f : 16.0f;
      chunk.w[4] = bits_of(scale);
      chunk.w[5] = bits_of(bias - kOne * scale);
    }
  }
}

// The weights of run `r` of a chunk. The bits of packed12's exponents are looked up in shared
// memory; an escape counts as zero.
template <Form F, int N>
DEVICE_INLINE void unpack(const Chunk<F>& chunk, int r, const uint32_t* exponents,
                          float (&out)[N]) {
  if constexpr (F == Form::Float) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = float_of(chunk.w[i]);
  } else if constexpr (F == Form::BFloat16 || F == Form::Half) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t pair = chunk.w[i];
      out[2 * i] = F == Form::BFloat16 ? bf16_low(pair) : half_of(static_cast<uint16_t>(pair));
      out[2 * i + 1] =
          F == Form::BFloat16 ? bf16_high(pair) : half_of(static_cast<uint16_t>(pair >> 16));
    }
  } else if constexpr (F == Form::Packed12) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t kept = chunk.w[2 * r + i / 4] >> 8 * (i % 4);
      const uint32_t code = chunk.w[4 + i / 4] >> (8 * (i % 4) + 4 * r) & 15;
      const uint32_t bits = (kept & 0x80) << 24 | exponents[code] | (kept & 0x7f) << 16;
      out[i] = float_of(code == kEscape ? 0 : bits);
    }
  } else {
    const float scale = float_of(chunk.w[4]), bias = float_of(chunk.w[5]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float q;
      if constexpr (F == Form::Affine8) {
        q = float_of(0x43800000u | (chunk.w[2 * r + i / 4] >> 8 * (i % 4) & 0xff) << 15);
      } else {
        q = float_of(0x41800000u | (chunk.w[r] >> 4 * i & 0xf) << 19);
      }
      out[i] = fmaf(scale, q, bias);
    }
  }
}

// One column of a row, as the reference makes a weight dense: rounded to T by the caller. Escapes
// are not in it.
DEVICE_INLINE float dense_at(const Weight& w, int64_t row, int64_t column) {
  const uint8_t* data = w.row(row);
  switch (w.form) {
    case Form::Float: return element_at(data, column, Element::Float);
    case Form::BFloat16: return element_at(data, column, Element::BFloat16);
    case Form::Half: return element_at(data, column, Element::Half);
    case Form::Packed12: {
      const int64_t c = column % kSegmentColumns, half = c / 64, i = c % 64;
      const int64_t byte = i % 32 / 8 * 16 + i / 32 * 8 + i % 8;
      const uint8_t* segment = data + column / kSegmentColumns * kSegmentBytes;
      const uint32_t kept = segment[half * 64 + byte];
      const uint32_t exponent = w.exponents[segment[128 + byte] >> 4 * half & 15];
      return float_of((kept & 0x80) << 24 | exponent << 23 | (kept & 0x7f) << 16);
    }
    default: {
      const int64_t at = row * (w.k / w.group) + column / w.group;
      const uint32_t q =
          w.form == Form::Affine8 ? data[column] : data[column / 2] >> 4 * (column % 2) & 15;
      return twice_rounded(element_at(w.scales, at, w.element), static_cast<float>(q),
                           element_at(w.biases, at, w.element));
    }
  }
}

// N inputs from a column on that is a multiple of N, out of a row that input_place() laid out.
template <int N, class T>
DEVICE_INLINE void inputs(const T* x, int column, float (&out)[N]) {
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
