// Which head of which token a warp of qk_norm_rope has, where it comes from and where it goes, as
// arithmetic. It needs no CUDA: the kernels compute with it, and so do the tests that run their
// sources on a host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "shared/host_device.h"

namespace heads {

constexpr int kWarps = 4;  // of a block: each has a head at a time
constexpr int64_t kMostBlocks = 1 << 30, kMostGroups = 65535;  // of a grid's two sides

// A GPU has no instruction that divides: 32 bits take a short sequence of them, 64 bits a long one.
HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A tensor [batch, length] or [batch, length, heads, ...] by its strides in elements.
template <class T>
struct Strided {
  T* data;
  int64_t batch, token, head;

  HOST_DEVICE T* at(int64_t b, int64_t t, int64_t h = 0) const {
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

  HOST_DEVICE constexpr int64_t half() const { return head_dim / 2; }
};

// One layer. The weights are null if q and k aren't normalized.
template <class T, class W>
struct Layer {
  Sizes sizes;
  Strided<const T> qkv;
  const W *q_weight, *k_weight;
  Strided<const int64_t> positions;
  const float* table;  // [table_length, head_dim]

  // cos and sin of a position; null if it isn't in the table.
  HOST_DEVICE const float* rotation(int64_t position) const {
    const bool inside = position >= 0 && position < sizes.table_length;
    return inside ? table + position * sizes.head_dim : nullptr;
  }
  // Whether a half of a head is whole vectors of 16 bytes, here and in what the layer reads.
  bool aligned() const {
    const auto starts = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return sizes.half() * static_cast<int64_t>(sizeof(T)) % 16 == 0 && qkv.aligned(16) &&
           starts(q_weight) && starts(k_weight) && starts(table);
  }
};

template <class T, class W>
struct Forward {
  Layer<T, W> layer;
  Strided<const int64_t> slots;  // null without a cache, like v
  Strided<T> q, k, v;

  HOST_DEVICE bool cached() const { return slots.data != nullptr; }
  // Without a cache v stays where it is.
  HOST_DEVICE int64_t heads() const {
    return layer.sizes.q_heads + (cached() ? 2 : 1) * layer.sizes.kv_heads;
  }
  bool aligned() const {
    return layer.aligned() && q.aligned(16) && k.aligned(16) && v.aligned(16);
  }
};

enum class Kind { Query, Key, Value };

// A head of one token.
struct TokenHead {
  int64_t batch, token, head;  // of the batch, of its row, of all heads
  Kind kind;
};

HOST_DEVICE TokenHead token_head(const Sizes& s, int64_t token, int64_t head) {
  const int64_t batch = s.length == 1 ? token : quotient(token, s.length);
  const Kind kind = head < s.q_heads                ? Kind::Query
                    : head < s.q_heads + s.kv_heads ? Kind::Key
                                                    : Kind::Value;
  return {batch, token - batch * s.length, head, kind};
}

// The place of the token in k and v.
template <class T, class W>
HOST_DEVICE int64_t slot_of(const Forward<T, W>& f, const TokenHead& at) {
  return f.cached() ? *f.slots.at(at.batch, at.token) : at.token;
}

// Where the head's result goes; null if its slot is outside of the cache.
template <class T, class W>
HOST_DEVICE T* target_of(const Forward<T, W>& f, const TokenHead& at, int64_t slot) {
  const Sizes& s = f.layer.sizes;
  if (at.kind == Kind::Query) return f.q.at(at.batch, at.token, at.head);
  if (f.cached() && (slot < 0 || slot >= s.max_length)) return nullptr;
  const int64_t own = at.head - s.q_heads;
  if (at.kind == Kind::Key) return f.k.at(at.batch, slot, own);
  return f.v.at(at.batch, slot, own - s.kv_heads);
}

template <class T, class W>
struct Backward {
  Layer<T, W> layer;
  Strided<const T> dq, dk, dv;
  Strided<T> dqkv;
  float *dq_partial, *dk_partial;  // [warps, head_dim]

  bool aligned() const {
    const auto starts = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return layer.aligned() && dq.aligned(16) && dk.aligned(16) && dv.aligned(16) &&
           dqkv.aligned(16) && starts(dq_partial) && starts(dk_partial);
  }
  HOST_DEVICE int64_t heads(Kind kind) const {
    return kind == Kind::Query ? layer.sizes.q_heads : layer.sizes.kv_heads;
  }
};

// One head in the backward.
template <class T>
struct HeadGradient {
  const T *dy, *x;
  T* dx;
  const float* rotation;
};

// That of the i-th head of a kind, token after token.
template <class T, class W>
HOST_DEVICE HeadGradient<T> head_gradient(const Backward<T, W>& b, Kind kind, int64_t i) {
  const Sizes& s = b.layer.sizes;
  const int64_t token = quotient(i, b.heads(kind)), own = i - token * b.heads(kind);
  const int64_t batch = quotient(token, s.length), at = token - batch * s.length;
  const int64_t head =
      own + (kind == Kind::Query ? 0 : s.q_heads) + (kind == Kind::Value ? s.kv_heads : 0);
  const Strided<const T>& dy = kind == Kind::Query ? b.dq : kind == Kind::Key ? b.dk : b.dv;
  HeadGradient<T> g{dy.at(batch, at, own), b.layer.qkv.at(batch, at, head),
                    b.dqkv.at(batch, at, head), nullptr};
  if (kind != Kind::Value) g.rotation = b.layer.rotation(*b.layer.positions.at(batch, at));
  return g;
}

// A grid that gives each head a warp of its own, as far as grids go.
struct Grid {
  int64_t tokens, groups;
};
inline Grid grid_of(int64_t tokens, int64_t heads) {
  return {std::min(tokens, kMostBlocks), std::min((heads + kWarps - 1) / kWarps, kMostGroups)};
}

}  // namespace heads
