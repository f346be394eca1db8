// Products of few rows of activations with a weight that streams from memory, each byte of it once.
//
// A row of a dense weight at a time: that is one contiguous stream. Rows of codes are some at a
// time, as loads of activations cost more than those of codes; what comes next is asked for in the
// order of memory, beyond the last of them.
// `Batch` rows of activations share the pass. What the sum of a row does, and in which order,
// depends on k alone: not on the batch, nor on the number of threads. Packed12 sums in the order of
// BFloat16, so that both give the same bits.
#include "cpu/weights/stream.h"
#include "cpu/weights/tiles.h"

#include "cpu/weights/ahead.h"

namespace {

// Loops over a batch must unroll whatever their length: their sums live in registers.
#define UNROLL _Pragma("GCC unroll 8")

// Two accumulators for each activation row.
template <int Batch>
struct Sums {
  Vec even[Batch], odd[Batch];
  Sums() { UNROLL for (int b = 0; b < Batch; ++b) even[b] = odd[b] = vec(0.0f); }
  void store_to(float* out, int64_t stride) const {
    for (int b = 0; b < Batch; ++b) out[b * stride] = sum(even[b] + odd[b]);
  }
};

// out[b * stride + r - begin] = row r of w times activation b, for rows [begin, end).
template <int Batch, class T>
void stream_dense(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                  int64_t stride) {
  constexpr int64_t step = 2 * Vec::size;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = reinterpret_cast<const T*>(w.row(r));
    Sums<Batch> sums;
    int64_t c = 0;
    for (; c + step <= w.k; c += step) {
      prefetch_weights(row + c);
      prefetch_weights(row + c + Vec::size);
      const Vec first = load(row + c, Full{}), second = load(row + c + Vec::size, Full{});
      UNROLL for (int b = 0; b < Batch; ++b) {
        sums.even[b] = fma(first, load(x[b].values + c, Full{}), sums.even[b]);
        sums.odd[b] = fma(second, load(x[b].values + c + Vec::size, Full{}), sums.odd[b]);
      }
    }
    for (; c < w.k; c += Vec::size) {
      const Tail tail{std::min<int64_t>(Vec::size, w.k - c)};
      const Vec part = tail.count == Vec::size ? load(row + c, Full{}) : load(row + c, tail);
      UNROLL for (int b = 0; b < Batch; ++b) sums.even[b] =
          fma(part, load(x[b].values + c, Full{}), sums.even[b]);
    }
    sums.store_to(out + r - begin, stride);
  }
}

template <int Batch, class P>
void stream_bf16(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  constexpr int64_t step = 2 * Bf16Pairs::size;
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* row = w.row(r);
    Sums<Batch> sums;
    const auto add = [&](int64_t c, Bf16Pairs first, Bf16Pairs second) {
      UNROLL for (int b = 0; b < Batch; ++b) {
        const P* at = reinterpret_cast<const P*>(x[b].values) + c;
        sums.even[b] = dot(first, at, sums.even[b]);
        sums.odd[b] = dot(second, at + Bf16Pairs::size, sums.odd[b]);
      }
    };
    int64_t c = 0;
    for (; c + step <= w.k; c += step) {
      prefetch_weights(row + 2 * c);
      prefetch_weights(row + 2 * (c + Bf16Pairs::size));
      add(c, load_pairs(row + 2 * c, Full{}), load_pairs(row + 2 * (c + Bf16Pairs::size), Full{}));
    }
    if (c < w.k) {
      const int64_t left = w.k - c, more = std::max<int64_t>(0, left - Bf16Pairs::size);
      const auto part = [&](int64_t at, int64_t count) {
        return count == Bf16Pairs::size ? load_pairs(row + 2 * at, Full{})
                                        : load_pairs(row + 2 * at, Tail{count});
      };
      add(c, part(c, left - more), part(c + Bf16Pairs::size, more));
    }
    sums.store_to(out + r - begin, stride);
  }
}

template <int Batch, class P>
void stream_packed12(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                     int64_t stride) {
  constexpr int kPairs = kSegmentColumns / Bf16Pairs::size;
  const Exponents table(w.exponents);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* segment = w.row(r);
    Sums<Batch> sums;
    int32_t escape = w.escape_starts[r];
    const int32_t last = w.escape_starts[r + 1];
    for (int64_t c = 0; c < w.k; c += kSegmentColumns, segment += kSegmentBytes) {
      Bf16Pairs pairs[kPairs];
      unpack_segment(segment, table, pairs);
      if (escape < last && w.escape_columns[escape] < c + kSegmentColumns) {
        // About 1 segment in 60 of normally distributed weights.
        uint16_t patched[kSegmentColumns];
        for (int i = 0; i < kPairs; ++i) store_pairs(patched + i * Bf16Pairs::size, pairs[i]);
        for (; escape < last && w.escape_columns[escape] < c + kSegmentColumns; ++escape)
          patched[w.escape_columns[escape] - c] = w.escape_values[escape];
        for (int i = 0; i < kPairs; ++i)
          pairs[i] = load_pairs(patched + i * Bf16Pairs::size, Full{});
      }
      UNROLL for (int b = 0; b < Batch; ++b) {
        const P* at = reinterpret_cast<const P*>(x[b].values) + c;
        for (int i = 0; i < kPairs; i += 2) {
          sums.even[b] = dot(pairs[i], at + i * Bf16Pairs::size, sums.even[b]);
          sums.odd[b] = dot(pairs[i + 1], at + (i + 1) * Bf16Pairs::size, sums.odd[b]);
        }
      }
    }
    sums.store_to(out + r - begin, stride);
  }
}

// The affine forms: per group s (q . x) + b sum(x); the sums of x are ready. With q - z for q and
// b + s z for b it is the same product. Centred codes (z = 128 or 8) keep the two terms small,
// which is worth two bits in float32. Against bfloat16, nibbles are 128 + q (z = -128), which a
// shift and a logical instruction make.

// sums[b] += the sum over groups of (b + z s) sum(x), for one row of scales and biases.
template <int Batch, class S>
inline void add_biases(const S* scales, const S* biases, int64_t groups, float zero,
                       const Activation* x, Vec (&sums)[Batch]) {
  sweep(groups, [&](int64_t g, auto part) {
    const Vec bias = fma(load(scales + g, part), vec(zero), load(biases + g, part));
    UNROLL for (int b = 0; b < Batch; ++b) sums[b] = fma(bias, load(x[b].sums + g, part), sums[b]);
  });
}

// Bytes against floats.
template <int Batch, class S>
void stream_bytes(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                  int64_t stride) {
  const int64_t groups = w.groups(), group = w.group;
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* row = w.row(r);
    const S* scales = reinterpret_cast<const S*>(w.scales) + r * groups;
    const S* biases = reinterpret_cast<const S*>(w.biases) + r * groups;
    prefetch_scales(scales, biases, groups);
    Vec sums[Batch];
    UNROLL for (int b = 0; b < Batch; ++b) sums[b] = vec(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      Vec dots[Batch];
      UNROLL for (int b = 0; b < Batch; ++b) dots[b] = vec(0.0f);
      for (int64_t c = g * group; c < (g + 1) * group; c += 32) {
        UNROLL for (int64_t i = c; i < c + 32; i += Vec::size) {
          const Vec q = load_bytes_less_128(row + i);
          UNROLL for (int b = 0; b < Batch; ++b) dots[b] =
              fma(q, load(x[b].values + i, Full{}), dots[b]);
        }
      }
      const Vec s = vec(widened(scales[g]));
      UNROLL for (int b = 0; b < Batch; ++b) sums[b] = fma(s, dots[b], sums[b]);
    }
    add_biases<Batch>(scales, biases, groups, 128.0f, x, sums);
    for (int b = 0; b < Batch; ++b) out[b * stride + r - begin] = sum(sums[b]);
  }
}

// A load of nibbles of each of some rows: each 16-bit lane has four of them, which are four columns
// of 4 bits, or the low and high halves of two columns of 8 bits. `scale` is that of each 32-bit
// lane's columns. The rows share each load of activations: those cost more than the codes.
template <int Bits, int Rows, int Batch, class P>
inline void add_nibbles(const Bf16Pairs (&raw)[Rows], const Vec (&scale)[Rows],
                        const P* const (&values)[Batch], int64_t c, Vec (&sums)[Rows][Batch]) {
  Bf16Pairs q[4][Rows];
  UNROLL for (int i = 0; i < Rows; ++i) {
    q[0][i] = nibble_plus_128<0>(raw[i]);
    q[1][i] = nibble_plus_128<1>(raw[i]);
    q[2][i] = nibble_plus_128<2>(raw[i]);
    q[3][i] = nibble_plus_128<3>(raw[i]);
  }
  UNROLL for (int b = 0; b < Batch; ++b) {
    // Of 8 bits, the halves; of 4 bits, two sums that don't wait for each other.
    Vec low[Rows], high[Rows];
    UNROLL for (int i = 0; i < Rows; ++i) low[i] = high[i] = vec(0.0f);
    const auto add = [&](const Bf16Pairs (&part)[Rows], int64_t first, Vec (&to)[Rows])
                         __attribute__((always_inline)) {
      const auto x = load_met(values[b] + c + first * Bf16Pairs::size);
      UNROLL for (int i = 0; i < Rows; ++i) to[i] = dot_nibbles(part[i], x, to[i]);
    };
    add(q[0], 0, low);
    add(q[1], Bits == 8 ? 0 : 1, high);
    add(q[2], Bits == 8 ? 1 : 2, low);
    add(q[3], Bits == 8 ? 1 : 3, high);
    UNROLL for (int i = 0; i < Rows; ++i) {
      const Vec dots = Bits == 8 ? fma(high[i], vec(16.0f), low[i]) : low[i] + high[i];
      sums[i][b] = fma(scale[i], dots, sums[i][b]);
    }
  }
}

// Rows of codes that share the loads of `Batch` rows of activations: as many as registers allow.
template <int Batch>
constexpr int kCodeRows = Batch <= 2 ? 4 : 2;

// Sums of rows that wait until there is one for each lane: a tree adds all of them up at once.
template <int Batch>
using Waiting = Vec[Batch][Vec::size];

// `Rows` rows of codes from row r on, a vector of codes at a time: add(places in the rows, part,
// scales, c, sums) with the scale of each 32-bit lane's columns, c being the first of them.
template <int Bits, int Batch, class S, int Rows, class Add>
inline void code_rows(const Weight& w, const Activation* x, int64_t r, const Spread& spread,
                      Waiting<Batch>& waiting, int64_t at, float zero, Add& add) {
  constexpr int64_t block = 32 / Bits * Vec::size;  // columns of one load
  // A block has several groups, or a group several blocks.
  const int64_t groups = w.groups(), a_block = std::max<int64_t>(1, block / w.group);
  const int64_t a_group = std::max<int64_t>(1, w.group / block);
  const S *scales[Rows], *biases[Rows];
  Vec sums[Rows][Batch];
  UNROLL for (int i = 0; i < Rows; ++i) {
    scales[i] = reinterpret_cast<const S*>(w.scales) + (r + i) * groups;
    biases[i] = reinterpret_cast<const S*>(w.biases) + (r + i) * groups;
    prefetch_scales(scales[i], biases[i], groups);
    UNROLL for (int b = 0; b < Batch; ++b) sums[i][b] = vec(0.0f);
  }
  // The rows lie one behind the other, and so are asked for: as one stream, behind the last.
  const uint8_t* ahead = w.row(r + Rows - 1);
  int64_t c = 0;
  for (int64_t first = 0; first < groups; first += Vec::size) {
    const int64_t count = std::min<int64_t>(Vec::size, groups - first);
    const bool full = count == Vec::size;
    Vec scale[Rows];
    UNROLL for (int i = 0; i < Rows; ++i) scale[i] =
        full ? load(scales[i] + first, Full{}) : load(scales[i] + first, Tail{count});
    const int32_t* lanes = spread.lanes[0];
    const int32_t* last = lanes + (count - a_block) * Vec::size;
    const auto step = [&](auto part) {
      const uint8_t* codes[Rows];
      Vec each[Rows];
      UNROLL for (int i = 0; i < Rows; ++i) {
        codes[i] = w.row(r + i) + c * Bits / 8;
        each[i] = permuted(scale[i], lanes);
      }
      add(codes, part, each, c, sums);
    };
    for (; lanes <= last; lanes += a_block * Vec::size)
      for (int64_t n = 0; n < a_group; ++n, c += block) {
        UNROLL for (int i = 0; i < Rows; ++i, ahead += 64) prefetch_weights(ahead);
        step(Full{});
      }
    if (count % a_block) step(Tail{(w.k - c) * Bits / 8});
  }
  UNROLL for (int i = 0; i < Rows; ++i) {
    add_biases<Batch>(scales[i], biases[i], groups, zero, x, sums[i]);
    UNROLL for (int b = 0; b < Batch; ++b) waiting[b][at + i] = sums[i][b];
  }
}

// All rows, `Rows` of them at a time: that changes no sum.
template <int Bits, int Batch, class S, int Rows, class Add>
inline void stream_codes(const Weight& w, const Activation* x, int64_t begin, int64_t end,
                         float* out, int64_t stride, float zero, Add&& add) {
  const Spread& spread = spread_of(w.group * Bits / 32);  // a lane meets 32 / Bits columns
  Waiting<Batch> waiting;
  for (auto& row : waiting)
    for (auto& sums : row) sums = vec(0.0f);
  for (int64_t r = begin; r < end; r += Vec::size) {
    const int64_t count = std::min<int64_t>(Vec::size, end - r);
    int64_t at = 0;
    for (; at + Rows <= count; at += Rows)
      code_rows<Bits, Batch, S, Rows>(w, x, r + at, spread, waiting, at, zero, add);
    for (; at < count; ++at)
      code_rows<Bits, Batch, S, 1>(w, x, r + at, spread, waiting, at, zero, add);
    for (int b = 0; b < Batch; ++b) {
      Vec sums[Vec::size];
      std::copy_n(waiting[b], Vec::size, sums);
      const Vec all = lane_sums(sums);
      float* to = out + b * stride + r - begin;
      count == Vec::size ? store(to, all, Full{}) : store(to, all, Tail{count});
    }
  }
}

// Nibbles against floats or bfloat16.
template <int Bits, int Batch, class P, class S>
void stream_nibbles(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                    int64_t stride) {
  constexpr bool centred = std::is_same_v<P, float>;
  constexpr float zero = centred ? 8.0f : Bits == 8 ? -128.0f * 17.0f : -128.0f;
  static_assert(Bits == 4 || !centred);
  const P* values[Batch];
  for (int b = 0; b < Batch; ++b) values[b] = reinterpret_cast<const P*>(x[b].values);
  const auto pairs = [](const uint8_t* codes, auto part) {
    if constexpr (std::is_same_v<decltype(part), Tail>)
      return load_pairs(codes, Tail{part.count / 2});
    else
      return load_pairs(codes, part);
  };
  stream_codes<Bits, Batch, S, kCodeRows<Batch>>(
      w, x, begin, end, out, stride, zero,
      [&](auto& codes, auto part, auto& scale, int64_t c, auto& sums) {
        constexpr int rows = std::extent_v<std::remove_reference_t<decltype(scale)>>;
        Bf16Pairs raw[rows];
        UNROLL for (int i = 0; i < rows; ++i) raw[i] = pairs(codes[i], part);
        add_nibbles<Bits, rows, Batch>(raw, scale, values, c, sums);
      });
}

// Bytes or nibbles against bytes: per lane an exact integer, then s_x and s. Of several rows of
// activations two rows of codes share each load of them.
template <int Bits, int Batch, class S>
void stream_int8(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  using Block = Int8Block<Bits>;
  const Block* blocks[Batch];
  for (int b = 0; b < Batch; ++b) blocks[b] = int8_blocks<Bits>(x[b]);
  stream_codes<Bits, Batch, S, kCodeRows<Batch>>(
      w, x, begin, end, out, stride, Block::zero,
      [&](auto& codes, auto part, auto& scale, int64_t c, auto& sums) {
        constexpr int rows = std::extent_v<std::remove_reference_t<decltype(scale)>>;
        Bytes first[rows], second[rows];  // of 8 bits there is one vector
        UNROLL for (int i = 0; i < rows; ++i) {
          const Bytes raw = load_bytes(codes[i], part);
          first[i] = Bits == 8 ? raw : low_nibbles(raw);
          second[i] = high_nibbles(raw);
        }
        UNROLL for (int b = 0; b < Batch; ++b) {
          const Block& block = blocks[b][c / Block::columns];
          const Bytes starts = load_bytes(block.starts, Full{});
          UNROLL for (int i = 0; i < rows; ++i) {
            Bytes dots = dot_bytes<Bits>(first[i], load_bytes(block.codes[0], Full{}), starts);
            if constexpr (Bits == 4)
              dots = dot_bytes<4>(second[i], load_bytes(block.codes[1], Full{}), dots);
            sums[i][b] = fma(to_floats(dots) * load(block.scales, Full{}), scale[i], sums[i][b]);
          }
        }
      });
}

template <int Batch, class T>
void stream_rows(const Weight& w, const Activation* x, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  using P = Arranged<T>;
  switch (w.form) {
    case Form::Float: return stream_dense<Batch, float>(w, x, begin, end, out, stride);
    case Form::Half: return stream_dense<Batch, fp16>(w, x, begin, end, out, stride);
    case Form::BFloat16: return stream_bf16<Batch, P>(w, x, begin, end, out, stride);
    case Form::Packed12: return stream_packed12<Batch, P>(w, x, begin, end, out, stride);
    case Form::Affine8:
      return with_element(w.element, [&](auto s) {
        if constexpr (std::is_same_v<P, float>)
          stream_bytes<Batch, decltype(s)>(w, x, begin, end, out, stride);
        else
          stream_nibbles<8, Batch, P, decltype(s)>(w, x, begin, end, out, stride);
      });
    case Form::Affine4:
      return with_element(w.element, [&](auto s) {
        stream_nibbles<4, Batch, P, decltype(s)>(w, x, begin, end, out, stride);
      });
    case Form::Affine8Int8:
      return with_element(w.element, [&](auto s) {
        stream_int8<8, Batch, decltype(s)>(w, x, begin, end, out, stride);
      });
    case Form::Affine4Int8:
      return with_element(w.element, [&](auto s) {
        stream_int8<4, Batch, decltype(s)>(w, x, begin, end, out, stride);
      });
  }
}

}  // namespace

template <class T>
void stream(const Weight& w, int batch, const Activation* x, int64_t begin, int64_t end, float* out,
            int64_t stride) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    if (w.form == Form::BFloat16 && batch > 1)
      return stream_tiled(w, batch, x, begin, end, out, stride);
#endif
  switch (compiled_batch(batch)) {
    case 1: return stream_rows<1, T>(w, x, begin, end, out, stride);
    case 2: return stream_rows<2, T>(w, x, begin, end, out, stride);
    case 4: return stream_rows<4, T>(w, x, begin, end, out, stride);
    default: return stream_rows<8, T>(w, x, begin, end, out, stride);
  }
}

template void stream<float>(const Weight&, int, const Activation*, int64_t, int64_t, float*,
                            int64_t);
template void stream<bf16>(const Weight&, int, const Activation*, int64_t, int64_t, float*,
                           int64_t);
template void stream<fp16>(const Weight&, int, const Activation*, int64_t, int64_t, float*,
                           int64_t);
