// decode_step's schedule, as arithmetic: which rows and columns of a weight a block, a warp and a
// lane have, which keys, where everything lies in scratch, and how many phases there are. It needs
// no CUDA: the kernel computes with it, and so do the tests that run its sources on a host.
#pragma once

#include <cstdint>

#include "cuda/warp.h"
#include "shared/host_device.h"
#include "shared/ranges.h"
#include "shared/weight_table.h"

namespace decode {

// 255 registers a thread: its loads in flight are what a block of more threads would have.
constexpr int kWarps = 8, kBlock = kLanes * kWarps;
constexpr int kMaxRows = 4;      // tokens that share one pass over a weight
constexpr int kMaxTokens = 8;    // of a sequence in one launch
constexpr int kMaxLayers = 128;  // their places in the cache are parameters of the kernel
constexpr int kRound = 256;      // rows of a weight between two combinations of their sums
constexpr int kKeys = 64;        // keys of one item of attention
constexpr int kHeads = 4;        // query heads that share one pass over values
constexpr int kPadding = 128;    // columns of a row of inputs in shared memory, as a multiple
constexpr int64_t kLine = 128;   // of the caches, in bytes

HOST_DEVICE constexpr int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
HOST_DEVICE constexpr int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE constexpr uint64_t greater(uint64_t a, uint64_t b) { return a > b ? a : b; }

// Whose share() thing i is in.
HOST_DEVICE constexpr int64_t owner(int64_t i, int64_t n, int64_t count) {
  return ((i + 1) * count - 1) / n;
}

// A chunk is what a lane loads at once: 16 bytes, or 24 of a packed12 weight. A unit is a chunk for
// every lane of a warp; the last one of a row may be short.
HOST_DEVICE constexpr int chunk_columns(Form form) {
  switch (form) {
    case Form::Float: return 4;
    case Form::Affine8:
    case Form::Packed12: return 16;
    case Form::Affine4: return 32;
    default: return 8;
  }
}
HOST_DEVICE int64_t units_of(const Weight& w) {
  const int columns = kLanes * chunk_columns(w.form);
  return (w.k + columns - 1) / columns;
}

// The first column of a lane's chunk. Eight lanes share a segment of packed12: each has 8 bytes of
// both halves of its signs and mantissas (their columns are 64 apart), and the 8 bytes of codes.
HOST_DEVICE constexpr int64_t chunk_column(Form form, int64_t unit, int lane) {
  if (form != Form::Packed12) return (unit * kLanes + lane) * chunk_columns(form);
  return (unit * (kLanes / 8) + lane / 8) * kSegmentColumns + lane % 2 * 32 + lane % 8 / 2 * 8;
}
HOST_DEVICE constexpr int64_t packed12_byte(int64_t unit, int lane) {
  return (unit * (kLanes / 8) + lane / 8) * kSegmentBytes + lane % 8 * 8;
}

HOST_DEVICE constexpr int64_t unit_bytes(Form form) {
  return form == Form::Packed12 ? kLanes / 8 * kSegmentBytes : kLanes * 16;
}
HOST_DEVICE int64_t row_length(const Weight& w) {
  if (w.form == Form::Packed12)
    return round_up(w.k, kSegmentColumns) / kSegmentColumns * kSegmentBytes;
  return w.k * 16 / chunk_columns(w.form);
}

// The rows of a weight that a block has: those of its outputs. If they are paired, output r has the
// rows r and second + r, so that a gate meets its value in the same block. Local row i is row(i).
struct BlockRows {
  Range outputs;
  int64_t second;
  bool paired;
  HOST_DEVICE int64_t count() const { return outputs.size() * (paired ? 2 : 1); }
  HOST_DEVICE int64_t row(int64_t i) const {
    const int64_t n = outputs.size();
    return i < n ? outputs.first + i : second + outputs.first + i - n;
  }
};
HOST_DEVICE BlockRows rows_of(int64_t outputs, bool paired, int64_t block, int64_t grid) {
  return {share(outputs, block, grid), outputs, paired};
}
// Its round of at most kRound rows from output `from` on.
HOST_DEVICE BlockRows round_of(const BlockRows& rows, int64_t from) {
  const int64_t room = kRound / (rows.paired ? 2 : 1);
  return {{from, smallest(from + room, rows.outputs.last)}, rows.second, rows.paired};
}

// Warps share the units of a round's rows, one after the other. A row that is whole in a warp's
// share has a sum of its own; one that begins before it is its edge 0, one that goes on its edge 1.
HOST_DEVICE constexpr int edge_of(int64_t row, int64_t units, const Range& mine) {
  const bool begins = row * units >= mine.first, ends = (row + 1) * units <= mine.last;
  return begins && ends ? -1 : begins ? 1 : 0;
}

// What a token (a row of the launch) belongs to and sees.
struct Place {
  int64_t sequence, keys;  // keys up to its own: 0 if it has no place
  int64_t before;          // new tokens of its sequence before it, which are the rows before it
};

// Attention works on items: one key/value head of one token over at most kKeys keys, so that the
// sums of an item are the same in any batch and for any number of tokens.
struct ItemIndex {
  int row;
  int64_t head, split, splits;
  Place place;
};
HOST_DEVICE constexpr int64_t splits_of(int64_t keys) { return (keys + kKeys - 1) / kKeys; }

enum class Phase { Embed, Qkv, Attend, Out, Up, Down, Head };
constexpr int kLayerPhases = 5;
HOST_DEVICE constexpr int phases_of(int layers) { return kLayerPhases * layers + 2; }
HOST_DEVICE constexpr int barriers_of(int layers) { return phases_of(layers) - 1; }
HOST_DEVICE constexpr Phase phase_at(int index, int layers) {
  if (index == 0) return Phase::Embed;
  if (index == phases_of(layers) - 1) return Phase::Head;
  return static_cast<Phase>(1 + (index - 1) % kLayerPhases);
}
HOST_DEVICE constexpr int layer_at(int index) { return (index - 1) / kLayerPhases; }

// Offsets in scratch, in bytes. The first `zeroed` bytes must be zero before a launch: they count
// the arrivals at the barrier, the blocks that know their likeliest tokens, and for each key/value
// head the splits that are done.
struct Scratch {
  int64_t ranked, finished, zeroed, places, hidden, qkv, attended, gated, ranks, partials, bytes;
};
HOST_DEVICE Scratch scratch_of(int64_t batch, int64_t dim, int64_t qkv_width, int64_t ffn_dim,
                               int64_t head_dim, int64_t max_length, int64_t element_size,
                               int64_t grid) {
  const int64_t heads = qkv_width / head_dim;
  Scratch s;
  s.ranked = kLine;
  s.finished = 2 * kLine;
  s.zeroed = s.places = s.finished + round_up(batch * heads * 4, kLine);
  s.hidden = s.places + round_up(batch * static_cast<int64_t>(sizeof(Place)), kLine);
  s.qkv = s.hidden + round_up(batch * dim * element_size, kLine);
  s.attended = s.qkv + round_up(batch * qkv_width * element_size, kLine);
  s.gated = s.attended + round_up(batch * qkv_width * element_size, kLine);
  s.ranks = s.gated + round_up(batch * ffn_dim * element_size, kLine);
  s.partials = s.ranks + round_up(batch * grid * 8, kLine);
  s.bytes = s.partials + batch * splits_of(max_length) * heads * (head_dim + 2) * 4;
  return s;
}
// A query head's part of a partial result: head_dim sums, the maximum, the sum of probabilities.
HOST_DEVICE constexpr int64_t partial_at(int64_t row, int64_t q_heads, int64_t q_head,
                                         int64_t max_splits, int64_t split, int64_t head_dim) {
  return ((row * q_heads + q_head) * max_splits + split) * (head_dim + 2);
}
// Where in the arena a layer's keys (or values, from its other offset on) of one head begin.
HOST_DEVICE constexpr int64_t cache_at(int64_t offset, int64_t sequence, int64_t kv_heads,
                                       int64_t head, int64_t max_length, int64_t head_dim) {
  return offset + (sequence * kv_heads + head) * max_length * head_dim;
}

// A logit and its token as one number, the largest of which is the likeliest token: that of the
// first of the largest logits, NaN being the largest. `bits` are those of the logit as a float.
HOST_DEVICE constexpr uint64_t rank_of(uint32_t bits, int64_t token) {
  constexpr uint32_t kSign = 0x80000000u;
  uint32_t key = (bits & kSign) ? ~bits : bits | kSign;
  if ((bits & ~kSign) == 0) key = kSign;  // -0 is no less than 0
  if ((bits & ~kSign) > 0x7f800000u) key = 0xffffffffu;
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
HOST_DEVICE constexpr int64_t token_of(uint64_t rank) {
  return 0xffffffffu - static_cast<uint32_t>(rank);
}

// Shared memory of a block, in bytes: a projection's and attention's, of which it needs the larger.
// Inputs are in the dtype of the activations, for each of `rows` tokens.
constexpr int64_t kTaskBytes = 192;
HOST_DEVICE constexpr int64_t project_floats(int rows) {
  // The phase's task; sums, edges, parts of norms; exponents.
  return kTaskBytes / 4 + rows * (kRound + 2 * kWarps + kWarps) + 16;
}
HOST_DEVICE constexpr int64_t value_parts(int64_t head_dim) {
  return largest(1, smallest(8, kBlock / head_dim));
}
HOST_DEVICE constexpr int64_t attend_floats(int64_t group, int64_t head_dim) {
  return kTaskBytes / 4 + (2 * group + 4 * kMaxTokens) * head_dim + group * (kKeys + 2) +
         kHeads * value_parts(head_dim) * head_dim;
}
HOST_DEVICE constexpr int64_t shared_bytes(int rows, int64_t widest, int64_t qkv_width,
                                           int64_t head_dim, int64_t element_size) {
  const int64_t project =
      project_floats(rows) * 4 + rows * round_up(widest, kPadding) * element_size;
  const int64_t attend = attend_floats(qkv_width / head_dim - 2, head_dim) * 4;
  return largest(project, qkv_width ? attend : 0);
}

// A row of inputs lies in shared memory in slots of 16 bytes. Lanes read every first, second,
// fourth or eighth slot: exchanged like this within each eight, these are in different banks.
template <class T>
HOST_DEVICE constexpr int slot_place(int slot) {
  return (slot ^ (slot >> 3 & 7)) * static_cast<int>(16 / sizeof(T));
}
template <class T>
HOST_DEVICE constexpr int input_place(int column) {
  constexpr int kPer = 16 / sizeof(T);
  return slot_place<T>(column / kPer) + column % kPer;
}

}  // namespace decode
