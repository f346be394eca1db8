// decode_step's CUDA sources compiled for a host: phase after phase, and in each phase block after
// block in an order of the caller's, with shared memory of nothing but NaN in the beginning.
#include <numeric>
#include <random>
#include <vector>

#include "cuda/decode/phases.cuh"

namespace {

using namespace decode;

// What a call is about; the fields are those of Call in test_decode_simulation.py.
struct Call {
  const int64_t *table, *tokens, *positions, *sequences, *offsets;
  void *arena, *logits;
  const float* rope_table;
  int64_t* chosen;
  int64_t layers, batch, arena_batch, rope_length, max_length, vocab_size, dim, head_dim, qkv_width, ffn_dim;
  int64_t dtype, gated, grid, rows, order, seed;
  int64_t missing;  // the barrier that isn't there; -1: none
  double eps;
};

std::vector<int> blocks_in_order(const Call& c, std::mt19937& random) {
  std::vector<int> blocks(c.grid);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (c.order == 1) std::reverse(blocks.begin(), blocks.end());
  if (c.order == 2) std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

template <int B, class T>
int run(const Call& c) {
  Step<T> s{};
  s.table = c.table;
  s.tokens = c.tokens;
  s.positions = c.positions;
  s.sequences = c.sequences;
  s.arena_batch = c.arena_batch;
  s.arena = static_cast<T*>(c.arena);
  s.rope_table = c.rope_table;
  s.logits = static_cast<T*>(c.logits);
  s.at = scratch_of(c.batch, c.dim, c.qkv_width, c.ffn_dim, c.head_dim, c.max_length, sizeof(T),
                    c.grid);
  s.chosen = c.chosen;
  s.rope_length = c.rope_length;
  s.max_length = c.max_length;
  s.dim = c.dim;
  s.head_dim = c.head_dim;
  s.qkv_width = c.qkv_width;
  s.ffn_dim = c.ffn_dim;
  s.vocab_size = c.vocab_size;
  s.layers = static_cast<int>(c.layers);
  s.batch = static_cast<int>(c.batch);
  s.grid = static_cast<int>(c.grid);
  s.gated = c.gated != 0;
  s.eps = static_cast<float>(c.eps);
  std::copy(c.offsets, c.offsets + 2 * c.layers, &s.offsets[0][0]);
  // Bytes of 0xff are NaN in every dtype. A line behind both shows a write beyond their end.
  std::vector<uint8_t> scratch(s.at.bytes + kLine, 0xff);
  std::fill_n(scratch.begin(), s.at.zeroed, uint8_t{0});
  s.scratch = scratch.data();
  const int64_t widest = std::max({c.dim, c.qkv_width, c.ffn_dim});
  const int64_t bytes = shared_bytes(B, widest, c.qkv_width, c.head_dim, sizeof(T));
  std::vector<uint8_t> shared;
  std::mt19937 random(static_cast<unsigned>(c.seed));
  const auto run_block = [&](int index, int phase) {
    shared.assign(bytes + kLine, 0xff);
    Block block{index, kBlock, shared.data(), c.order == 1 || (c.order == 2 && random() % 2)};
    run_phase<B>(block, s, phase);
    return std::all_of(shared.begin() + bytes, shared.end(), [](uint8_t x) { return x == 0xff; });
  };
  for (int phase = 0; phase < phases_of(s.layers); ++phase) {
    // Without the barrier behind it a phase's blocks go on to the next one.
    const bool two = c.missing == phase;
    for (int index : blocks_in_order(c, random)) {
      if (!run_block(index, phase) || (two && !run_block(index, phase + 1))) return 1;
    }
    phase += two;
  }
  const auto untouched = [](uint8_t x) { return x == 0xff; };
  if (!std::all_of(scratch.begin() + s.at.bytes, scratch.end(), untouched)) return 2;
  const auto zero = [](uint8_t x) { return x == 0; };
  if (misaligned) return 4;
  return std::all_of(scratch.begin(), scratch.begin() + s.at.zeroed, zero) ? 0 : 3;
}

template <class T>
int run(const Call& c) {
  return c.rows == 1 ? run<1, T>(c) : run<kMaxRows, T>(c);
}

}  // namespace

extern "C" int simulate(const Call* call) {
  switch (call->dtype) {
    case 0: return run<float>(*call);
    case 1: return run<bf16>(*call);
    default: return run<fp16>(*call);
  }
}

extern "C" int64_t count_barriers(int64_t layers) { return barriers_of(static_cast<int>(layers)); }

extern "C" uint64_t rank(float logit, int64_t token) { return rank_of(bits_of(logit), token); }

extern "C" int64_t count_shared_bytes(int64_t rows, int64_t widest, int64_t qkv_width,
                                      int64_t head_dim, int64_t element_size) {
  return shared_bytes(static_cast<int>(rows), widest, qkv_width, head_dim, element_size);
}
