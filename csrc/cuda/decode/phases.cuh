// The phases of decode_step in their order. Between two of them every block must have ended the
// first: that is the kernel's barrier.
#pragma once

#include "cuda/decode/attend.cuh"
#include "cuda/decode/project.cuh"

namespace decode {

// The tokens' places, and the embedding's rows, dense, as the first hidden numbers.
template <class T>
DEVICE_CALL void embed(Block block, const Step<T>& s) {
  const Weight w = weight_from(s.fields(s.layers) + kEmbedding);
  for (int64_t row = block.index; row < s.batch; row += s.grid) {
    T* to = s.hidden() + row * s.dim;
    const Place place = s.place_of(static_cast<int>(row));
    const bool known = place.keys > 0;
    const int64_t token = s.tokens[row];
    block.threads([&](int thread) {
      if (thread == 0) s.places()[row] = place;
      for (int64_t c = thread; c < s.dim; c += kBlock)
        to[c] = narrow<T>(known ? dense_at(w, token, c) : NAN);
    });
    if (w.form != Form::Packed12 || !known) continue;
    block.threads([&](int thread) {
      const int32_t last = w.escape_starts[token + 1];
      for (int32_t e = w.escape_starts[token] + thread; e < last; e += kBlock)
        to[w.escape_columns[e]] =
            narrow<T>(float_of(static_cast<uint32_t>(w.escape_values[e]) << 16));
    });
  }
}

// The likeliest token after each one: each block's own, then those of all by the block that comes
// last. That one is behind every block's reads of tokens, which may be overwritten from then on.
template <class T>
DEVICE_CALL void choose(Block block, const Step<T>& s) {
  const Range mine = share(s.vocab_size, block.index, s.grid);
  block.warps([&](Warp warp) {
    for (int row = warp.index; row < s.batch; row += kWarps) {
      const T* logits = s.logits + row * s.vocab_size;
      PerLane<uint64_t> best;
      warp.each([&](int lane) {
        best[lane] = 0;  // less than any token's
#pragma unroll 8
        for (int64_t i = mine.first + lane; i < mine.last; i += kLanes)
          best[lane] = greater(best[lane], rank_of(bits_of(wide(fresh(logits + i))), i));
      });
      warp.maximum(best);
      warp.each([&](int lane) {
        if (lane == 0) s.ranks()[row * s.grid + block.index] = best[lane];
      });
    }
  });
  if (!block.last_of(s.ranked(), static_cast<uint32_t>(s.grid))) return;
  block.warps([&](Warp warp) {
    for (int row = warp.index; row < s.batch; row += kWarps) {
      PerLane<uint64_t> best;
      warp.each([&](int lane) {
        best[lane] = 0;
#pragma unroll 4
        for (int i = lane; i < s.grid; i += kLanes)
          best[lane] = greater(best[lane], fresh(s.ranks() + row * s.grid + i));
      });
      warp.maximum(best);
      warp.each([&](int lane) {
        if (lane == 0) s.chosen[row] = token_of(best[lane]);
      });
    }
  });
}

template <int B, class T>
DEVICE_INLINE void run_phase(Block& block, const Step<T>& s, int index) {
  const Phase phase = phase_at(index, s.layers);
  const int layer = phase == Phase::Head ? s.layers : layer_at(index);
  if (phase == Phase::Embed) {
    embed(block, s);
  } else if (phase == Phase::Attend) {
    attend(block, s, layer);
  } else {
    project<B>(block, s, phase, layer);
    if (phase == Phase::Head && s.chosen != nullptr) choose(block, s);
  }
  if (phase == Phase::Head) return;
  // Attention reads no weight: those of what comes after it were asked for before it, and a block
  // whose items are done (or that has none, which are most in a short context) has memory bring
  // what comes after that. Out's own call then finds the lines there.
  const int next = index + (phase == Phase::Qkv || phase == Phase::Attend ? 2 : 1);
  const Phase then = phase_at(next, s.layers);
  prefetch_task(block, s, then, then == Phase::Head ? s.layers : layer_at(next));
}

}  // namespace decode
