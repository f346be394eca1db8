// A launch of decode_step, and what each of its projection phases works on.
#pragma once

#include "cuda/decode/plan.cuh"
#include "cuda/simt.cuh"

namespace decode {

using namespace simt;

// One launch: everything in it is the same for all blocks.
template <class T>
struct Step {
  const int64_t* table;  // [layers + 1, kLayerFields]
  const int64_t *tokens, *positions;
  const int64_t* sequences;  // null: token i is the only one of sequence i
  T* arena;
  const float* rope_table;
  T* logits;
  int64_t* chosen;  // null, or where the likeliest tokens go; it may be `tokens`
  uint8_t* scratch;
  Scratch at;
  int64_t rope_length, max_length, dim, head_dim, qkv_width, ffn_dim, vocab_size;
  int64_t arena_batch;
  int layers, batch, grid;  // batch: tokens
  bool gated;
  float eps;
  int64_t offsets[kMaxLayers][2];  // of keys and values, in elements of the arena

  DEVICE_INLINE const int64_t* fields(int layer) const { return table + layer * kLayerFields; }
  DEVICE_INLINE T* hidden() const { return reinterpret_cast<T*>(scratch + at.hidden); }
  DEVICE_INLINE T* qkv() const { return reinterpret_cast<T*>(scratch + at.qkv); }
  DEVICE_INLINE T* attended() const { return reinterpret_cast<T*>(scratch + at.attended); }
  DEVICE_INLINE T* activated() const { return reinterpret_cast<T*>(scratch + at.gated); }
  DEVICE_INLINE float* partials() const { return reinterpret_cast<float*>(scratch + at.partials); }
  DEVICE_INLINE uint32_t* finished() const {
    return reinterpret_cast<uint32_t*>(scratch + at.finished);
  }
  DEVICE_INLINE uint32_t* ranked() const {
    return reinterpret_cast<uint32_t*>(scratch + at.ranked);
  }
  DEVICE_INLINE uint64_t* ranks() const { return reinterpret_cast<uint64_t*>(scratch + at.ranks); }
  DEVICE_INLINE Place* places() const { return reinterpret_cast<Place*>(scratch + at.places); }

  DEVICE_INLINE int64_t sequence_of(int row) const {
    return sequences == nullptr ? row : sequences[row];
  }
  DEVICE_INLINE bool in_range(int row) const {
    const int64_t token = tokens[row], position = positions[row], sequence = sequence_of(row);
    return token >= 0 && token < weight_from(fields(layers) + kEmbedding).n && position >= 0 &&
           position < smallest(rope_length, max_length) && sequence >= 0 && sequence < arena_batch;
  }
  // Without keys if the token, or one of its sequence before it, is outside of the vocabulary, the
  // rotary table or the cache, or isn't behind the one before: then its logits are NaN, and nothing
  // is written to the cache. Nobody waits for the device, so it can't raise.
  DEVICE_INLINE Place place_of(int row) const {
    const int64_t sequence = sequence_of(row);
    int first = row;
    while (first > 0 && sequence_of(first - 1) == sequence) --first;
    bool known = row - first < kMaxTokens;
    for (int other = 0; other < first; ++other) known = known && sequence_of(other) != sequence;
    for (int other = first; other <= row; ++other)
      known = known && in_range(other) && positions[other] == positions[first] + other - first;
    return {sequence, known ? positions[row] + 1 : 0, row - first};
  }
};

// A projection phase: its weight, its inputs (hidden numbers through a norm, or rows of scratch)
// and its output.
template <class T>
struct Task {
  Weight weight;
  const T* norm;  // null: inputs are taken as they are
  const T* inputs;
  int64_t inputs_stride;
  T* out;
  int64_t out_stride, outputs;
  int grid;
  bool paired;            // the weight has rows of a gate and of its values
  bool added, activated;  // to the output: a residual; SwiGLU or SiLU

  DEVICE_INLINE BlockRows round(int block, int64_t from) const {
    return round_of(rows_of(outputs, paired, block, grid), from);
  }
};

template <class T>
DEVICE_INLINE Task<T> task_of(const Step<T>& s, Phase phase, int layer) {
  const int64_t* f = s.fields(layer);
  const auto norm = [](int64_t field) { return reinterpret_cast<const T*>(field); };
  Task<T> t{};
  t.inputs = s.hidden();
  t.inputs_stride = t.out_stride = s.dim;
  t.out = s.hidden();
  switch (phase) {
    case Phase::Qkv:
      t.weight = weight_from(f + kQkvProj);
      t.norm = norm(f[kAttnNorm]);
      t.out = s.qkv();
      t.out_stride = s.qkv_width;
      break;
    case Phase::Out:
      t.weight = weight_from(f + kOutProj);
      t.inputs = s.attended();
      t.inputs_stride = s.qkv_width;
      t.added = true;
      break;
    case Phase::Up:
      t.weight = weight_from(f + kProj1);
      t.norm = norm(f[kFfnNorm]);
      t.out = s.activated();
      t.out_stride = s.ffn_dim;
      t.paired = s.gated;
      t.activated = true;
      break;
    case Phase::Down:
      t.weight = weight_from(f + kProj2);
      t.inputs = s.activated();
      t.inputs_stride = s.ffn_dim;
      t.added = true;
      break;
    default:
      t.weight = weight_from(f + kHead);
      t.norm = norm(f[kLastNorm]);
      t.out = s.logits;
      t.out_stride = s.vocab_size;
  }
  t.grid = s.grid;
  t.outputs = t.paired ? t.weight.n / 2 : t.weight.n;
  return t;
}

}  // namespace decode
