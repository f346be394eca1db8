// Attention of one new token a sequence, as one phase of decode_step: QK norm, RoPE, the write to
// the cache, and softmax over the cache in items of kKeys keys. Whichever block ends an item last
// merges those of its head, in the order of their keys.
#pragma once

#include "decode_project.cuh"

namespace decode {

// An item and what it works on.
template <class T>
struct Job {
  const T *q_norm, *k_norm, *projected;  // the last: the row of q | k | v
  T *new_keys, *new_values;              // the new token's places, null where another item has them
  const T *keys, *values;                // the first of its keys and values
  const float* rotation;
  T* out;                           // [group, head_dim]
  float* partials;                  // of the group's first query head, for its first split
  int partial_step, split, splits;  // floats from a query head to the next
  int group, count, head_dim;       // keys
  int q_row, k_row, v_row;          // in heads
  float eps;
};

// What an item has in shared memory.
template <class T>
struct Bench {
  Job<T>* job;
  float *raw, *queries;         // [group + 2, head_dim] as projected; [group, head_dim] rotated
  float *scores, *tops, *sums;  // [group, kKeys], [group], [group]
  float* totals;                // [value_parts, kHeads, head_dim]

  DECODE_DEVICE explicit Bench(uint8_t* shared) {
    static_assert(sizeof(Job<T>) <= kTaskBytes);
    job = reinterpret_cast<Job<T>*>(shared);
    const int group = job->group, d = job->head_dim;
    raw = reinterpret_cast<float*>(shared + kTaskBytes);
    queries = raw + (group + 2) * d;
    scores = queries + group * d;
    tops = scores + group * kKeys;
    sums = tops + group;
    totals = sums + group;
  }
};

template <class T>
DECODE_DEVICE int64_t keys_of(const Step<T>& s, int row) {
  return s.in_range(row) ? s.positions[row] + 1 : 0;
}

// The i-th item of a layer, sequence after sequence; false where there are no more.
template <class T>
DECODE_DEVICE bool item_at(const Step<T>& s, int64_t kv_heads, int64_t i, Item& item) {
  for (int row = 0; row < s.batch; ++row) {
    const int64_t keys = keys_of(s, row), splits = splits_of(keys);
    if (i < kv_heads * splits) {
      item = {row, i / splits, i % splits, splits, keys};
      return true;
    }
    i -= kv_heads * splits;
  }
  return false;
}

// One head through its norm and the rotation: out(c, value) for all its columns.
template <class T, class Out>
DECODE_DEVICE void rotate_head(Warp warp, const float* x, const T* weight, const Job<T>& job,
                               Out&& out) {
  const int d = job.head_dim, half = d / 2;
  PerLane<Floats<1>> squares;
  warp.each([&](int lane) {
    float sum = 0.0f;
    for (int c = lane; c < d; c += kLanes) sum += x[c] * x[c];
    squares[lane].v[0] = sum;
  });
  warp.template sum<kLanes>(squares);
  warp.each([&](int lane) {
    const float rstd = 1.0f / sqrtf(squares[lane].v[0] / static_cast<float>(d) + job.eps);
    for (int c = lane; c < half; c += kLanes) {
      float a = x[c], b = x[half + c];
      if (weight != nullptr) {
        a = rounded<T>(rounded<T>(a * rstd) * wide(weight[c]));
        b = rounded<T>(rounded<T>(b * rstd) * wide(weight[half + c]));
      }
      const float cos = job.rotation[c], sin = job.rotation[half + c];
      out(c, narrow<T>(a * cos - b * sin));
      out(half + c, narrow<T>(b * cos + a * sin));
    }
  });
}

// Queries to shared memory; with the new token's own keys, those and its values to the cache.
template <class T>
DECODE_CALL void prepare(Block block) {
  const Bench<T> bench(block.shared());
  const Job<T>& job = *bench.job;
  const int d = job.head_dim, group = job.group;
  const int rows = group + (job.new_keys != nullptr ? 2 : 0);
  block.threads([&](int thread) {
    for (int i = thread; i < rows * d; i += kBlock) {
      const int r = i / d, head = r < group ? job.q_row + r : r == group ? job.k_row : job.v_row;
      bench.raw[i] = wide(fresh(job.projected + static_cast<int64_t>(head) * d + i % d));
    }
  });
  block.warps([&](Warp warp) {
    for (int r = warp.index; r < rows; r += kWarps) {
      const float* x = bench.raw + r * d;
      if (r < group) {
        float* to = bench.queries + r * d;
        rotate_head(warp, x, job.q_norm, job, [&](int c, T y) { to[c] = wide(y); });
      } else if (r == group) {
        rotate_head(warp, x, job.k_norm, job, [&](int c, T y) { job.new_keys[c] = y; });
      } else {
        warp.each([&](int lane) {
          for (int c = lane; c < d; c += kLanes) job.new_values[c] = narrow<T>(x[c]);
        });
      }
    }
  });
}

// Scores of the item's keys, times log2(e): some lanes to every key.
template <class T>
DECODE_CALL void score(Block block) {
  constexpr int kParts = kLanes * kWarps / kKeys;
  constexpr float kLog2e = 1.44269504088896340736f;
  const Bench<T> bench(block.shared());
  const int d = bench.job->head_dim, group = bench.job->group, count = bench.job->count;
  const T* keys = bench.job->keys;
  const float scale = kLog2e / sqrtf(static_cast<float>(d));
  block.warps([&](Warp warp) {
    for (int g0 = 0; g0 < group; g0 += kHeads) {
      PerLane<Floats<kHeads>> dots;
      const float* queries = bench.queries + g0 * d;
      const int heads = group - g0;
      warp.each([&](int lane) {
        const int j = warp.index * (kLanes / kParts) + lane / kParts;
        Floats<kHeads>& dot = dots[lane];
#pragma unroll
        for (int g = 0; g < kHeads; ++g) dot.v[g] = 0.0f;
        if (j >= count) return;
        const T* key = keys + static_cast<int64_t>(j) * d;
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
            bench.scores[(g0 + g) * kKeys + j] = j < count ? dots[lane].v[g] * scale : -INFINITY;
      });
    }
  });
}

// Scores to probabilities 2^(score - top), with the top and the sum of each query head.
template <class T>
DECODE_CALL void softmax(Block block) {
  const Bench<T> bench(block.shared());
  block.warps([&](Warp warp) {
    for (int g = warp.index; g < bench.job->group; g += kWarps) {
      float* p = bench.scores + g * kKeys;
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
        bench.tops[g] = top[lane].v[0];
        bench.sums[g] = sum[lane].v[0];
      });
    }
  });
}

// Probabilities times values for query heads [g0, g0 + kHeads): some keys to every thread.
template <class T>
DECODE_CALL void sum_values(Block block, int g0) {
  const Bench<T> bench(block.shared());
  const int d = bench.job->head_dim, parts = static_cast<int>(value_parts(d));
  const int heads = bench.job->group - g0, count = bench.job->count;
  const T* values = bench.job->values;
  const float* scores = bench.scores + g0 * kKeys;
  block.threads([&](int thread) {
    for (int i = thread; i < parts * d; i += kBlock) {
      const int part = i / d, c = i % d;
      Floats<kHeads> total = {};
#pragma unroll 8
      for (int j = part; j < count; j += parts) {
        const float x = wide(values[static_cast<int64_t>(j) * d + c]);
#pragma unroll
        for (int g = 0; g < kHeads; ++g)
          if (g < heads) total.v[g] = fmaf(scores[g * kKeys + j], x, total.v[g]);
      }
#pragma unroll
      for (int g = 0; g < kHeads; ++g) bench.totals[(part * kHeads + g) * d + c] = total.v[g];
    }
  });
}

// Their sums over the threads: the result where this item has all keys, else a partial one.
template <class T>
DECODE_CALL void hand_over(Block block, int g0) {
  const Bench<T> bench(block.shared());
  const Job<T>& job = *bench.job;
  const int d = job.head_dim, parts = static_cast<int>(value_parts(d));
  const int heads = job.group - g0 < kHeads ? job.group - g0 : kHeads;
  block.threads([&](int thread) {
    for (int i = thread; i < heads * d; i += kBlock) {
      const int g = i / d, c = i % d, head = g0 + g;
      float total = 0.0f;
      for (int part = 0; part < parts; ++part) total += bench.totals[(part * kHeads + g) * d + c];
      if (job.splits == 1) {
        job.out[head * d + c] = narrow<T>(total / bench.sums[head]);
        continue;
      }
      float* to =
          job.partials + static_cast<int64_t>(head) * job.partial_step + job.split * (d + 2);
      to[c] = total;
      if (c != 0) continue;
      to[d] = bench.tops[head];
      to[d + 1] = bench.sums[head];
    }
  });
}

// The partial results of one head's items, all of which are there.
template <class T>
DECODE_CALL void merge(Block block) {
  const Bench<T> bench(block.shared());
  const Job<T>& job = *bench.job;
  const int d = job.head_dim, splits = job.splits;
  block.threads([&](int thread) {
    for (int i = thread; i < job.group * d; i += kBlock) {
      const int head = i / d, c = i % d;
      const float* from = job.partials + static_cast<int64_t>(head) * job.partial_step;
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
      job.out[i] = narrow<T>(total / sum);
    }
  });
}

template <class T>
DECODE_DEVICE Job<T> job_of(const Step<T>& s, int layer, const Item& item) {
  const int64_t* rest = s.fields(layer) + 4 * kWeightFields;
  const int64_t q_heads = rest[4], kv_heads = rest[5], d = s.head_dim;
  const int64_t group = q_heads / kv_heads, position = item.keys - 1, first = item.split * kKeys;
  const auto cached = [&](int64_t offset) {
    return s.arena + cache_at(offset, item.row, kv_heads, item.head, s.max_length, d);
  };
  T *keys = cached(s.offsets[layer][0]), *values = cached(s.offsets[layer][1]);
  const bool writes = item.split == item.splits - 1;
  const int64_t q_head = item.head * group, splits = splits_of(s.max_length);
  Job<T> job;
  job.q_norm = reinterpret_cast<const T*>(rest[1]);
  job.k_norm = reinterpret_cast<const T*>(rest[2]);
  job.projected = s.qkv() + item.row * s.qkv_width;
  job.new_keys = writes ? keys + position * d : nullptr;
  job.new_values = values + position * d;
  job.keys = keys + first * d;
  job.values = values + first * d;
  job.rotation = s.rope_table + position * d;
  job.out = s.attended() + item.row * s.qkv_width + q_head * d;
  job.partials = s.partials() + partial_at(item.row, q_heads, q_head, splits, 0, d);
  job.partial_step = static_cast<int>(splits * (d + 2));
  job.split = static_cast<int>(item.split);
  job.splits = static_cast<int>(item.splits);
  job.group = static_cast<int>(group);
  job.count = static_cast<int>(smallest(kKeys, item.keys - first));
  job.head_dim = static_cast<int>(d);
  job.q_row = static_cast<int>(q_head);
  job.k_row = static_cast<int>(q_heads + item.head);
  job.v_row = static_cast<int>(q_heads + kv_heads + item.head);
  job.eps = s.eps;
  return job;
}

template <class T>
DECODE_CALL void attend(Block block, const Step<T>& s, int layer) {
  const int64_t kv_heads = s.fields(layer)[4 * kWeightFields + 5];
  Item item;
  for (int64_t i = block.index; item_at(s, kv_heads, i, item); i += s.grid) {
    block.threads([&](int thread) {
      if (thread == 0) *reinterpret_cast<Job<T>*>(block.shared()) = job_of(s, layer, item);
    });
    prepare<T>(block);
    score<T>(block);
    softmax<T>(block);
    const int group = reinterpret_cast<const Job<T>*>(block.shared())->group;
    for (int g0 = 0; g0 < group; g0 += kHeads) {
      sum_values<T>(block, g0);
      hand_over<T>(block, g0);
    }
    if (item.splits == 1) continue;
    uint32_t* finished = s.finished() + item.row * kv_heads + item.head;
    if (block.last_of(finished, static_cast<uint32_t>(item.splits))) merge<T>(block);
  }
}

}  // namespace decode
