// Attention of the new tokens, as one phase of decode_step: QK norm, RoPE, the write to the cache,
// and softmax over the cache in items of kKeys keys. The block that ends the last item of a head
// merges all of that head, in the order of their keys.
//
// A token's keys and values are written by its own item in this phase, so that no other item may
// read them there: an item makes those of the new tokens that it sees for itself, by the same steps
// and so of the same bits. That is up to 8 heads' norms and rotations, and spares a barrier.
#pragma once

#include "cuda/decode/step.cuh"

namespace decode {

// What one item works on.
template <class T>
struct AttendItem {
  const T *q_norm, *k_norm, *projected;  // the last: the token's row of q | k | v
  T *own_keys, *own_values;              // the token's places; null if another item has them
  const T *keys, *values;                // the first of its keys and values
  const float* rotation;
  T* out;                           // [group, head_dim]
  float* partials;                  // of the group's first query head, for its first split
  int partial_step, split, splits;  // floats from a query head to the next
  int group, count, head_dim;       // `count` keys
  int news, newest;                 // the last keys are of new tokens, the last `newest` rows back
  int width;                        // of a row of q | k | v
  int q_row, k_row, v_row;          // in heads
  float eps;
};

// An item in shared memory.
template <class T>
struct AttendShared {
  AttendItem<T>* item;
  float *raw, *queries;         // [group + 2 news, head_dim] projected; [group, head_dim] rotated
  float *scores, *tops, *sums;  // [group, kKeys], [group], [group]
  float* totals;                // [value_parts, kHeads, head_dim]
  T *keys, *values;             // [news, head_dim]

  DEVICE_INLINE explicit AttendShared(uint8_t* shared) {
    static_assert(sizeof(AttendItem<T>) <= kTaskBytes);
    item = reinterpret_cast<AttendItem<T>*>(shared);
    const int group = item->group, d = item->head_dim;
    raw = reinterpret_cast<float*>(shared + kTaskBytes);
    queries = raw + (group + 2 * kMaxTokens) * d;
    scores = queries + group * d;
    tops = scores + group * kKeys;
    sums = tops + group;
    totals = sums + group;
    keys = reinterpret_cast<T*>(totals + kHeads * value_parts(d) * d);
    values = keys + kMaxTokens * d;
  }

  // The item's j-th key or value: `cached`, or one of the new ones.
  DEVICE_INLINE const T* place(const T* cached, const T* news, int j) const {
    const int fresh_from = item->count - item->news;
    return j < fresh_from ? cached + static_cast<int64_t>(j) * item->head_dim
                          : news + (j - fresh_from) * item->head_dim;
  }
};

// The i-th item of a layer, token after token; false if there are no more.
template <class T>
DEVICE_INLINE bool item_at(const Step<T>& s, int64_t kv_heads, int64_t i, ItemIndex& index) {
  for (int row = 0; row < s.batch; ++row) {
    const Place* place = s.places() + row;
    const int64_t keys = fresh(&place->keys), splits = splits_of(keys);
    if (i < kv_heads * splits) {
      const Place found{fresh(&place->sequence), keys, fresh(&place->before)};
      index = {row, i / splits, i % splits, splits, found};
      return true;
    }
    i -= kv_heads * splits;
  }
  return false;
}

// One head through its norm and the rotation: out(c, value) for all its columns.
template <class T, class Out>
DEVICE_INLINE void rotate_head(Warp warp, const float* x, const T* weight, const float* rotation,
                               const AttendItem<T>& item, Out&& out) {
  const int d = item.head_dim, half = d / 2;
  PerLane<Floats<1>> squares;
  warp.each([&](int lane) {
    float sum = 0.0f;
    for (int c = lane; c < d; c += kLanes) sum += x[c] * x[c];
    squares[lane].v[0] = sum;
  });
  warp.template sum<kLanes>(squares);
  warp.each([&](int lane) {
    const float rstd = 1.0f / sqrtf(squares[lane].v[0] / static_cast<float>(d) + item.eps);
    for (int c = lane; c < half; c += kLanes) {
      float a = x[c], b = x[half + c];
      if (weight != nullptr) {
        a = rounded<T>(rounded<T>(a * rstd) * wide(weight[c]));
        b = rounded<T>(rounded<T>(b * rstd) * wide(weight[half + c]));
      }
      const float cos = rotation[c], sin = rotation[half + c];
      out(c, narrow<T>(a * cos - b * sin));
      out(half + c, narrow<T>(b * cos + a * sin));
    }
  });
}

// Queries, and the keys and values of new tokens, to shared memory; the token's own to the cache.
template <class T>
DEVICE_CALL void prepare(Block block) {
  const AttendShared<T> shared(block.shared());
  const AttendItem<T>& item = *shared.item;
  const int d = item.head_dim, group = item.group, news = item.news;
  const int rows = group + 2 * news;
  // Row group + t is the key of new token t, row group + news + t its value.
  const auto token_of = [&](int r) { return r < group + news ? r - group : r - group - news; };
  const auto back = [&](int t) { return static_cast<int64_t>(item.newest + news - 1 - t); };
  block.threads([&](int thread) {
    for (int i = thread; i < rows * d; i += kBlock) {
      const int r = i / d;
      const int head = r < group ? item.q_row + r : r < group + news ? item.k_row : item.v_row;
      const int64_t row = r < group ? 0 : back(token_of(r)) * item.width;
      shared.raw[i] = wide(fresh(item.projected - row + static_cast<int64_t>(head) * d + i % d));
    }
  });
  block.warps([&](Warp warp) {
    for (int r = warp.index; r < rows; r += kWarps) {
      const float* x = shared.raw + r * d;
      if (r < group) {
        float* to = shared.queries + r * d;
        rotate_head(warp, x, item.q_norm, item.rotation, item,
                    [&](int c, T y) { to[c] = wide(y); });
        continue;
      }
      const int t = token_of(r);
      const bool own = item.own_keys != nullptr && t == news - 1;
      if (r < group + news) {
        T* to = shared.keys + t * d;
        rotate_head(warp, x, item.k_norm, item.rotation - back(t) * d, item, [&](int c, T y) {
          to[c] = y;
          if (own) item.own_keys[c] = y;
        });
      } else {
        T* to = shared.values + t * d;
        warp.each([&](int lane) {
          for (int c = lane; c < d; c += kLanes) {
            to[c] = narrow<T>(x[c]);
            if (own) item.own_values[c] = to[c];
          }
        });
      }
    }
  });
}

// Scores of the item's keys, times log2(e): some lanes to every key.
template <class T>
DEVICE_CALL void score(Block block) {
  constexpr int kParts = kLanes * kWarps / kKeys;
  constexpr float kLog2e = 1.44269504088896340736f;
  const AttendShared<T> shared(block.shared());
  const int d = shared.item->head_dim, group = shared.item->group, count = shared.item->count;
  const float scale = kLog2e / sqrtf(static_cast<float>(d));
  block.warps([&](Warp warp) {
    for (int g0 = 0; g0 < group; g0 += kHeads) {
      PerLane<Floats<kHeads>> dots;
      const float* queries = shared.queries + g0 * d;
      const int heads = group - g0;
      warp.each([&](int lane) {
        const int j = warp.index * (kLanes / kParts) + lane / kParts;
        Floats<kHeads>& dot = dots[lane];
#pragma unroll
        for (int g = 0; g < kHeads; ++g) dot.v[g] = 0.0f;
        if (j >= count) return;
        const T* key = shared.place(shared.item->keys, shared.keys, j);
#pragma unroll 8
        for (int c = lane % kParts; c < d; c += kParts) {
          const float x = wide(key[c]);
#pragma unroll
          for (int g = 0; g < kHeads; ++g)
            if (g < heads) dot.v[g] = fmaf(queries[g * d + c], x, dot.v[g]);
        }
      });
      warp.template sum<kParts>(dots);
      warp.each([&](int lane) {
        const int j = warp.index * (kLanes / kParts) + lane / kParts;
        if (lane % kParts != 0) return;
#pragma unroll
        for (int g = 0; g < kHeads; ++g)
          if (g < heads)
            shared.scores[(g0 + g) * kKeys + j] = j < count ? dots[lane].v[g] * scale : -INFINITY;
      });
    }
  });
}

// Scores to probabilities 2^(score - top), with the top and the sum of each query head.
template <class T>
DEVICE_CALL void softmax(Block block) {
  const AttendShared<T> shared(block.shared());
  block.warps([&](Warp warp) {
    for (int g = warp.index; g < shared.item->group; g += kWarps) {
      float* p = shared.scores + g * kKeys;
      PerLane<Floats<1>> top, sum;
      warp.each([&](int lane) { top[lane].v[0] = fmaxf(p[lane], p[lane + kLanes]); });
      warp.maximum(top);
      warp.each([&](int lane) {
        p[lane] = exp2f(p[lane] - top[lane].v[0]);
        p[lane + kLanes] = exp2f(p[lane + kLanes] - top[lane].v[0]);
        sum[lane].v[0] = p[lane] + p[lane + kLanes];
      });
      warp.template sum<kLanes>(sum);
      warp.each([&](int lane) {
        if (lane != 0) return;
        shared.tops[g] = top[lane].v[0];
        shared.sums[g] = sum[lane].v[0];
      });
    }
  });
}

// Probabilities times values for query heads [g0, g0 + kHeads): some keys to every thread.
template <class T>
DEVICE_CALL void sum_values(Block block, int g0) {
  const AttendShared<T> shared(block.shared());
  const int d = shared.item->head_dim, parts = static_cast<int>(value_parts(d));
  const int heads = shared.item->group - g0, count = shared.item->count;
  const float* scores = shared.scores + g0 * kKeys;
  block.threads([&](int thread) {
    for (int i = thread; i < parts * d; i += kBlock) {
      const int part = i / d, c = i % d;
      Floats<kHeads> total = {};
#pragma unroll 8
      for (int j = part; j < count; j += parts) {
        const float x = wide(shared.place(shared.item->values, shared.values, j)[c]);
#pragma unroll
        for (int g = 0; g < kHeads; ++g)
          if (g < heads) total.v[g] = fmaf(scores[g * kKeys + j], x, total.v[g]);
      }
#pragma unroll
      for (int g = 0; g < kHeads; ++g) shared.totals[(part * kHeads + g) * d + c] = total.v[g];
    }
  });
}

// Their sums over the threads: the result if this item has all keys, else a partial one.
template <class T>
DEVICE_CALL void hand_over(Block block, int g0) {
  const AttendShared<T> shared(block.shared());
  const AttendItem<T>& item = *shared.item;
  const int d = item.head_dim, parts = static_cast<int>(value_parts(d));
  const int heads = item.group - g0 < kHeads ? item.group - g0 : kHeads;
  block.threads([&](int thread) {
    for (int i = thread; i < heads * d; i += kBlock) {
      const int g = i / d, c = i % d, head = g0 + g;
      float total = 0.0f;
      for (int part = 0; part < parts; ++part) total += shared.totals[(part * kHeads + g) * d + c];
      if (item.splits == 1) {
        item.out[head * d + c] = narrow<T>(total / shared.sums[head]);
        continue;
      }
      float* to =
          item.partials + static_cast<int64_t>(head) * item.partial_step + item.split * (d + 2);
      to[c] = total;
      if (c != 0) continue;
      to[d] = shared.tops[head];
      to[d + 1] = shared.sums[head];
    }
  });
}

// The partial results of one head's items, all of which are there.
template <class T>
DEVICE_CALL void merge(Block block) {
  const AttendShared<T> shared(block.shared());
  const AttendItem<T>& item = *shared.item;
  const int d = item.head_dim, splits = item.splits;
  block.threads([&](int thread) {
    for (int i = thread; i < item.group * d; i += kBlock) {
      const int head = i / d, c = i % d;
      const float* from = item.partials + static_cast<int64_t>(head) * item.partial_step;
      float top = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll 4
      for (int split = 0; split < splits; ++split)
        top = fmaxf(top, fresh(from + split * (d + 2) + d));
#pragma unroll 4
      for (int split = 0; split < splits; ++split) {
        const float* one = from + split * (d + 2);
        const float shrink = exp2f(fresh(one + d) - top);
        total = fmaf(fresh(one + c), shrink, total);
        sum = fmaf(fresh(one + d + 1), shrink, sum);
      }
      item.out[i] = narrow<T>(total / sum);
    }
  });
}

template <class T>
DEVICE_INLINE AttendItem<T> attend_item(const Step<T>& s, int layer, const ItemIndex& at) {
  const int64_t* f = s.fields(layer);
  const int64_t q_heads = f[kQHeads], kv_heads = f[kKvHeads], d = s.head_dim;
  const int64_t group = q_heads / kv_heads, position = at.place.keys - 1, first = at.split * kKeys;
  const int64_t count = smallest(kKeys, at.place.keys - first);
  const int64_t newest = at.place.keys - first - count;
  const auto cached = [&](int64_t offset) {
    return s.arena + cache_at(offset, at.place.sequence, kv_heads, at.head, s.max_length, d);
  };
  T *keys = cached(s.offsets[layer][0]), *values = cached(s.offsets[layer][1]);
  const bool writes = at.split == at.splits - 1;
  const int64_t q_head = at.head * group, splits = splits_of(s.max_length);
  AttendItem<T> item;
  item.q_norm = reinterpret_cast<const T*>(f[kQNorm]);
  item.k_norm = reinterpret_cast<const T*>(f[kKNorm]);
  item.projected = s.qkv() + at.row * s.qkv_width;
  item.own_keys = writes ? keys + position * d : nullptr;
  item.own_values = values + position * d;
  item.keys = keys + first * d;
  item.values = values + first * d;
  item.rotation = s.rope_table + position * d;
  item.out = s.attended() + at.row * s.qkv_width + q_head * d;
  item.partials = s.partials() + partial_at(at.row, q_heads, q_head, splits, 0, d);
  item.partial_step = static_cast<int>(splits * (d + 2));
  item.split = static_cast<int>(at.split);
  item.splits = static_cast<int>(at.splits);
  item.group = static_cast<int>(group);
  item.count = static_cast<int>(count);
  item.news = static_cast<int>(largest(0, smallest(count, at.place.before + 1 - newest)));
  item.newest = static_cast<int>(newest);
  item.width = static_cast<int>(s.qkv_width);
  item.head_dim = static_cast<int>(d);
  item.q_row = static_cast<int>(q_head);
  item.k_row = static_cast<int>(q_heads + at.head);
  item.v_row = static_cast<int>(q_heads + kv_heads + at.head);
  item.eps = s.eps;
  return item;
}

template <class T>
DEVICE_CALL void attend(Block block, const Step<T>& s, int layer) {
  const int64_t kv_heads = s.fields(layer)[kKvHeads];
  ItemIndex at;
  for (int64_t i = block.index; item_at(s, kv_heads, i, at); i += s.grid) {
    block.threads([&](int thread) {
      if (thread == 0)
        *reinterpret_cast<AttendItem<T>*>(block.shared()) = attend_item(s, layer, at);
    });
    prepare<T>(block);
    score<T>(block);
    softmax<T>(block);
    const int group = reinterpret_cast<const AttendItem<T>*>(block.shared())->group;
    for (int g0 = 0; g0 < group; g0 += kHeads) {
      sum_values<T>(block, g0);
      hand_over<T>(block, g0);
    }
    if (at.splits == 1) continue;
    uint32_t* finished = s.finished() + at.row * kv_heads + at.head;
    if (block.last_of(finished, static_cast<uint32_t>(at.splits))) merge<T>(block);
  }
}

}  // namespace decode
