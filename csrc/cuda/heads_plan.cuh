// Which head of which token a warp of qk_norm_rope has, where it comes from and where it goes, as
// arithmetic. No CUDA in here: the kernels compute with it, and so does the host that checks them.
#pragma once

#include "decode_plan.cuh"

namespace heads {

constexpr int kWarps = 4;  // of a block: each has a head at a time
constexpr int64_t kMostBlocks = 1 << 30, kMostGroups = 65535;  // of a grid's two sides

// No instruction divides: of 32 bits it takes a short sequence of them, of 64 a long one.
DECODE_BOTH int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A tensor [batch, length] or [batch, length, heads, ...] by its strides in elements.
template <class T>
struct Places {
  T* data;
  int64_t batch, token, head;

  DECODE_BOTH T* at(int64_t b, int64_t t, int64_t h = 0) const {
    return data + b * batch + t * token + h * head;
  }
  // Whether each head starts on a boundary of `bytes`.
  bool aligned(int64_t bytes) const {
    const int64_t size = sizeof(T);
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && batch * size % bytes == 0 &&
           token * size % bytes == 0 && head * size % bytes == 0;
  }
};

struct Sizes {
  int64_t tokens, length;  // of all sequences, of each of them
  int64_t q_heads, kv_heads, head_dim, table_length, max_length;
  float eps;

  DECODE_BOTH constexpr int64_t half() const { return head_dim / 2; }
};

// One layer. What a call has not is null: weights where q and k aren't normalised, slots and v
// where there is no cache.
template <class T, class W>
struct Layer {
  Sizes sizes;
  Places<const T> qkv;
  const W *q_weight, *k_weight;
  Places<const int64_t> positions;
  const float* table;  // [table_length, head_dim]

  // cos and sin of a position; null where it isn't in the table.
  DECODE_BOTH const float* rotation(int64_t position) const {
    const bool inside = position >= 0 && position < sizes.table_length;
    return inside ? table + position * sizes.head_dim : nullptr;
  }
  // Whether a half of a head is whole packs of 16 bytes, here and in what the layer reads.
  bool aligned() const {
    const auto starts = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return sizes.half() * static_cast<int64_t>(sizeof(T)) % 16 == 0 && qkv.aligned(16) &&
           starts(q_weight) && starts(k_weight) && starts(table);
  }
};

template <class T, class W>
struct Forward {
  Layer<T, W> layer;
  Places<const int64_t> slots;
  Places<T> q, k, v;

  DECODE_BOTH bool cached() const { return slots.data != nullptr; }
  // Without a cache v stays where it is.
  DECODE_BOTH int64_t heads() const {
    return layer.sizes.q_heads + (cached() ? 2 : 1) * layer.sizes.kv_heads;
  }
  bool aligned() const {
    return layer.aligned() && q.aligned(16) && k.aligned(16) && v.aligned(16);
  }
};

enum class Kind { Query, Key, Value };

// A head of one token.
struct Trip {
  int64_t batch, at, head;  // among all heads
  Kind kind;
};

DECODE_BOTH Trip trip_of(const Sizes& s, int64_t token, int64_t head) {
  const int64_t batch = s.length == 1 ? token : quotient(token, s.length);
  const Kind kind = head < s.q_heads                ? Kind::Query
                    : head < s.q_heads + s.kv_heads ? Kind::Key
                                                    : Kind::Value;
  return {batch, token - batch * s.length, head, kind};
}

// Where along k and v its token goes.
template <class T, class W>
DECODE_BOTH int64_t slot_of(const Forward<T, W>& f, const Trip& trip) {
  return f.cached() ? *f.slots.at(trip.batch, trip.at) : trip.at;
}

// Where its result goes; null where its slot is outside of the cache.
template <class T, class W>
DECODE_BOTH T* target_of(const Forward<T, W>& f, const Trip& trip, int64_t slot) {
  const Sizes& s = f.layer.sizes;
  if (trip.kind == Kind::Query) return f.q.at(trip.batch, trip.at, trip.head);
  if (f.cached() && (slot < 0 || slot >= s.max_length)) return nullptr;
  const int64_t own = trip.head - s.q_heads;
  if (trip.kind == Kind::Key) return f.k.at(trip.batch, slot, own);
  return f.v.at(trip.batch, slot, own - s.kv_heads);
}

template <class T, class W>
struct Backward {
  Layer<T, W> layer;
  Places<const T> dq, dk, dv;
  Places<T> dqkv;
  float *dq_partial, *dk_partial;  // [warps, head_dim]

  bool aligned() const {
    const auto starts = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return layer.aligned() && dq.aligned(16) && dk.aligned(16) && dv.aligned(16) &&
           dqkv.aligned(16) && starts(dq_partial) && starts(dk_partial);
  }
  DECODE_BOTH int64_t heads(Kind kind) const {
    return kind == Kind::Query ? layer.sizes.q_heads : layer.sizes.kv_heads;
  }
};

template <class T>
struct Return {
  const T *dy, *x;
  T* dx;
  const float* rotation;
};

// The i-th head of a kind, token after token.
template <class T, class W>
DECODE_BOTH Return<T> return_of(const Backward<T, W>& b, Kind kind, int64_t i) {
  const Sizes& s = b.layer.sizes;
  const int64_t token = quotient(i, b.heads(kind)), own = i - token * b.heads(kind);
  const int64_t batch = quotient(token, s.length), at = token - batch * s.length;
  const int64_t head =
      own + (kind == Kind::Query ? 0 : s.q_heads) + (kind == Kind::Value ? s.kv_heads : 0);
  const Places<const T>& dy = kind == Kind::Query ? b.dq : kind == Kind::Key ? b.dk : b.dv;
  Return<T> r{dy.at(batch, at, own), b.layer.qkv.at(batch, at, head), b.dqkv.at(batch, at, head),
              nullptr};
  if (kind != Kind::Value) r.rotation = b.layer.rotation(*b.layer.positions.at(batch, at));
  return r;
}

// A grid that gives each head a warp of its own, as far as grids go.
struct Grid {
  int64_t tokens, groups;
};
inline Grid grid_of(int64_t tokens, int64_t heads) {
  return {decode::smallest(tokens, kMostBlocks),
          decode::smallest((heads + kWarps - 1) / kWarps, kMostGroups)};
}

}  // namespace heads
