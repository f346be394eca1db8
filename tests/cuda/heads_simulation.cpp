// qk_norm_rope's CUDA sources compiled for a host: warp after warp, in an order of the caller's.
#include <numeric>
#include <random>
#include <vector>

#include "cuda/heads.cuh"

namespace {

using namespace heads;

struct Where {
  void* data;
  int64_t batch, token, head;

  template <class T>
  Strided<T> of() const {
    return {static_cast<T*>(data), batch, token, head};
  }
};

// What a call is about; the fields are those of Call in test_heads_simulation.py.
struct Call {
  const void *q_weight, *k_weight;
  const float* table;
  float *dq_partial, *dk_partial;
  Where qkv, positions, slots, q, k, v, dq, dk, dv, dqkv;
  int64_t tokens, length, q_heads, kv_heads, head_dim, table_length, max_length;
  int64_t dtype, wide_weight, backward;
  int64_t blocks, groups;  // of a grid; 0: as many as the kernel has
  int64_t shuffled, seed;
  double eps;
};

template <class T, class W>
Layer<T, W> layer_of(const Call& c) {
  return {{c.tokens, c.length, c.q_heads, c.kv_heads, c.head_dim, c.table_length, c.max_length,
           static_cast<float>(c.eps)},
          c.qkv.of<const T>(),
          static_cast<const W*>(c.q_weight),
          static_cast<const W*>(c.k_weight),
          c.positions.of<const int64_t>(),
          c.table};
}

// run(block, group, warp) for every warp of a grid.
template <class Run>
void in_order(const Call& c, int64_t blocks, int64_t groups, Run&& run) {
  std::vector<int64_t> all(blocks * groups * heads::kWarps);
  std::iota(all.begin(), all.end(), int64_t{0});
  std::mt19937 random(static_cast<unsigned>(c.seed));
  if (c.shuffled) std::shuffle(all.begin(), all.end(), random);
  for (int64_t i : all)
    run(i / heads::kWarps % blocks, i / heads::kWarps / blocks,
        Warp{static_cast<int>(i % heads::kWarps)});
}

template <int N, class T, class W>
void run_forward(const Call& c, const Forward<T, W>& f) {
  Grid grid = grid_of(c.tokens, f.heads());
  if (c.blocks) grid.tokens = c.blocks;
  if (c.groups) grid.groups = c.groups;
  in_order(c, grid.tokens, grid.groups, [&](int64_t block, int64_t group, Warp warp) {
    heads::run_forward<N>(warp, f, block, grid.tokens, group * heads::kWarps + warp.index,
                          grid.groups * heads::kWarps);
  });
}

template <int N, class T, class W>
void run_backward(const Call& c, const Backward<T, W>& b) {
  in_order(c, c.blocks, 1, [&](int64_t block, int64_t, Warp warp) {
    heads::run_backward<N>(warp, b, block * heads::kWarps + warp.index, c.blocks * heads::kWarps);
  });
}

// The columns of a lane, or -1 where something was not aligned to them.
template <class T, class W>
int run(const Call& c) {
  constexpr int N = 16 / sizeof(T);
  misaligned = false;
  bool whole;
  if (c.backward) {
    const Backward<T, W> b{layer_of<T, W>(c),  c.dq.of<const T>(), c.dk.of<const T>(),
                           c.dv.of<const T>(), c.dqkv.of<T>(),     c.dq_partial,
                           c.dk_partial};
    whole = b.aligned();
    whole ? run_backward<N>(c, b) : run_backward<1>(c, b);
  } else {
    const Forward<T, W> f{layer_of<T, W>(c), c.slots.of<const int64_t>(), c.q.of<T>(), c.k.of<T>(),
                          c.v.of<T>()};
    whole = f.aligned();
    whole ? run_forward<N>(c, f) : run_forward<1>(c, f);
  }
  return misaligned ? -1 : whole ? N : 1;
}

template <class T>
int run(const Call& c) {
  return c.wide_weight ? run<T, float>(c) : run<T, T>(c);
}

}  // namespace

extern "C" int simulate(const Call* call) {
  switch (call->dtype) {
    case 0: return run<float>(*call);
    case 1: return run<bf16>(*call);
    default: return run<fp16>(*call);
  }
}

extern "C" int64_t divide(int64_t a, int64_t b) { return quotient(a, b); }
