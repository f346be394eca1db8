// decode_step: the next tokens of each sequence through a whole decoder, in one parallel region.
//
// Every weight is read once, whatever the number of tokens. That is the floor, and the rest hides
// behind it. A layer is five stages of the team: qkv_proj, attention (with QK norm, RoPE and the
// cache write), out_proj, proj_1 with its gate, proj_2. Each thread takes blocks of the rows of
// each weight. It normalizes the whole (short) input by itself, which is cheaper than one more
// stage.
#include "cpu/attention/attend.h"
#include "cpu/op.h"
#include "cpu/refuse.h"
#include "cpu/rope.h"
#include "cpu/thread_team.h"
#include "cpu/weights/ahead.h"
#include "cpu/weights/dense.h"
#include "cpu/weights/stream.h"

namespace {

template <class T>
struct Layer {
  Weight qkv_proj, out_proj, proj_1, proj_2;
  const T *attn_norm, *q_norm, *k_norm, *ffn_norm;
  int64_t q_heads, kv_heads;
  T *keys, *values;  // [batch, kv_heads, max_length, head_dim]
};

template <class T>
struct Decoder {
  std::vector<Layer<T>> layers;
  Weight embedding, head;
  const T* norm;
  const float* rope_table;
  int64_t dim, head_dim, max_length;
  bool gated;
  float eps;

  Decoder(const Tensor& table, const Tensor& arena, const Tensor& offsets) {
    const int64_t count = table.size(0) - 1;
    const int64_t* row = data<const int64_t>(table);
    const int64_t* at = data<const int64_t>(offsets);
    const auto norm_at = [](int64_t field) { return reinterpret_cast<const T*>(field); };
    for (int64_t i = 0; i < count; ++i, row += kLayerFields, at += 2)
      layers.push_back({weight_from(row + kQkvProj), weight_from(row + kOutProj),
                        weight_from(row + kProj1), weight_from(row + kProj2),
                        norm_at(row[kAttnNorm]), norm_at(row[kQNorm]), norm_at(row[kKNorm]),
                        norm_at(row[kFfnNorm]), row[kQHeads], row[kKvHeads], data<T>(arena) + at[0],
                        data<T>(arena) + at[1]});
    embedding = weight_from(row + kEmbedding);
    head = weight_from(row + kHead);
    norm = norm_at(row[kLastNorm]);
  }
};

// The tokens of one sequence: neighbouring rows, at positions one behind the other.
struct Run {
  int64_t sequence, first, count, position;  // the last of the first token
};

std::vector<Run> runs_of(const int64_t* positions, const int64_t* sequences, int64_t tokens) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t sequence = sequences == nullptr ? i : sequences[i];
    if (runs.empty() || runs.back().sequence != sequence)
      runs.push_back({sequence, i, 1, positions[i]});
    else
      ++runs.back().count;
  }
  return runs;
}

// What the threads of the team share: one row for each token.
template <class T>
struct State {
  std::vector<Run> runs;
  int64_t batch, qkv_width, ffn, q_width = 0;  // rows; of the widest layers
  int64_t longest = 1;                         // run
  std::vector<T> hidden, qkv, attended, gated;

  State(const Decoder<T>& decoder, std::vector<Run> of, int64_t batch, int64_t qkv_width,
        int64_t ffn)
      : runs(std::move(of)), batch(batch), qkv_width(qkv_width), ffn(ffn) {
    for (const Layer<T>& layer : decoder.layers) q_width = std::max(q_width, layer.out_proj.k);
    for (const Run& run : runs) longest = std::max(longest, run.count);
    hidden.resize(batch * decoder.dim);
    qkv.resize(batch * qkv_width);
    attended.resize(batch * q_width);
    gated.resize(batch * ffn);
  }
};

constexpr int64_t kBlock = 64;  // rows of a weight between two roundings of their sums

// The likeliest token so far, as torch.argmax finds it: the first of the largest, NaN being that.
struct Best {
  float logit = 0.0f;
  int64_t token = -1;  // none yet

  // The next token in turn.
  void meet(float x, int64_t other) {
    if (token < 0 || x > logit || (x != x && logit == logit)) {
      logit = x;
      token = other;
    }
  }
  // Those of other rows, in any order.
  void meet(const Best& other) {
    if (other.token < 0) return;
    const bool equal = other.logit == logit || (other.logit != other.logit && logit != logit);
    if (token >= 0 && equal && token < other.token) return;
    if (equal || token < 0)
      *this = other;
    else
      meet(other.logit, other.token);
  }
};

// What one thread needs for itself. Nothing is allocated inside the parallel region.
template <class T>
struct Scratch {
  int batch;  // as compiled
  Activations activations;
  std::vector<T> normed, queries;
  std::vector<float> sums, more_sums, attention;
  std::vector<Best> best;  // of its rows of the vocabulary, for each token

  static int64_t widest(const Decoder<T>& d, const State<T>& s) {
    return std::max({d.dim, s.q_width, s.ffn});
  }

  Scratch(const Decoder<T>& decoder, const State<T>& state)
      : batch(compiled_batch(state.batch)),
        activations(state.batch, widest(decoder, state), widest(decoder, state) / 32),
        normed(decoder.dim),
        sums(batch * kBlock),
        more_sums(batch * kBlock),
        best(state.batch) {
    int64_t group = 1;
    for (const Layer<T>& layer : decoder.layers)
      group = std::max(group, layer.q_heads / layer.kv_heads);
    queries.resize(state.longest * group * decoder.head_dim);
    attention.resize(attend_scratch(state.longest * group, decoder.head_dim));
    // Rows that the compiled batch has too many repeat the last one.
    while (static_cast<int>(activations.rows.size()) < batch)
      activations.rows.push_back(activations.rows.back());
  }
};

template <class T>
class Step {
 public:
  Step(const Decoder<T>& decoder, State<T>& state, Scratch<T>& own, TeamThread& thread,
       T* logits, bool chooses)
      : decoder_(decoder),
        state_(state),
        own_(own),
        thread_(thread),
        logits_(logits),
        chooses_(chooses) {}

  void run() {
    for (size_t i = 0; i < decoder_.layers.size(); ++i) {
      const Layer<T>& layer = decoder_.layers[i];
      const auto normed = [&](const T* norm, const Weight& w) { arrange_normed(norm, w); };
      next(layer.out_proj, layer.out_proj.n);
      rows(
          layer.qkv_proj, [&] { normed(layer.attn_norm, layer.qkv_proj); },
          [&](int64_t b, int64_t r, int64_t count, const float* sums) {
            rounded(sums, count, state_.qkv.data() + b * state_.qkv_width + r);
          });
      attend(layer);
      next(layer.proj_1, layer.proj_2.k);
      add_to_hidden(layer.out_proj, state_.attended.data(), state_.q_width);
      next(layer.proj_2, layer.proj_2.n);
      feed_forward(layer.proj_1, [&] { normed(layer.ffn_norm, layer.proj_1); });
      const bool last = i + 1 == decoder_.layers.size();
      const Weight& after = last ? decoder_.head : decoder_.layers[i + 1].qkv_proj;
      next(after, after.n);
      add_to_hidden(layer.proj_2, state_.gated.data(), state_.ffn);
    }
    ahead_ = {};
    rows(
        decoder_.head, [&] { arrange_normed(decoder_.norm, decoder_.head); },
        [&](int64_t b, int64_t r, int64_t count, const float* sums) {
          rounded(sums, count, logits_ + b * decoder_.head.n + r);
          if (chooses_) choose(b, r, count, sums);
        });
  }

 private:
  static void rounded(const float* sums, int64_t count, T* out) {
    sweep(count, [&](int64_t i, auto part) { store(out + i, load(sums + i, part), part); });
  }

  // About a nanosecond a token of the vocabulary; reading its row takes tens.
  void choose(int64_t b, int64_t first, int64_t count, const float* sums) {
    float logits[kBlock];
    sweep(count, [&](int64_t i, auto part) {
      store(logits + i, round_to<T>(load(sums + i, part)), part);
    });
    Best best;
    for (int64_t i = 0; i < count; ++i) best.meet(logits[i], first + i);
    own_.best[b].meet(best);
  }

  void arrange_rows(const T* x, int64_t stride, const Weight& w) {
    for (int64_t b = 0; b < state_.batch; ++b) arrange(w, x + b * stride, own_.activations.rows[b]);
  }

  void arrange_normed(const T* weight, const Weight& w) {
    const int64_t n = decoder_.dim;
    for (int64_t b = 0; b < state_.batch; ++b) {
      const T* x = state_.hidden.data() + b * n;
      norm_row(x, weight, own_.normed.data(), n, row_rstd(x, n, decoder_.eps));
      arrange(w, own_.normed.data(), own_.activations.rows[b]);
    }
  }

  void sums_of(const Weight& w, int64_t begin, int64_t end, float* out) {
    const int count = static_cast<int>(state_.batch);
    stream<T>(w, count, own_.activations.rows.data(), begin, end, out, kBlock);
  }

  // Where the next weight begins for this thread: a stage shares out `shared` of its rows.
  void next(const Weight& w, int64_t shared) {
    const Range mine = thread_.share_of(shared);
    const int64_t bytes = mine.size() * w.row_bytes;
    ahead_ = Ahead(w.row(mine.first), std::min(kDistances.next, bytes));
    if (w.affine() && bytes > 0) ahead_.scales_of(w, mine.first);
  }

  // done(b, first row, rows, sums) for this thread's blocks of a weight's rows, whose activations
  // arranged() has arranged.
  template <class Arranged, class Done>
  void rows(const Weight& w, Arranged&& arranged, Done&& done) {
    const auto work = [&](int64_t first, int64_t last) {
      sums_of(w, first, last, own_.sums.data());
      for (int64_t b = 0; b < state_.batch; ++b)
        done(b, first, last - first, own_.sums.data() + b * kBlock);
    };
    thread_.stage(w.n, kBlock, arranged, work, [&] { ahead_.fetch(); });
  }

  void add_to_hidden(const Weight& w, const T* from, int64_t stride) {
    rows(
        w, [&] { arrange_rows(from, stride, w); },
        [&](int64_t b, int64_t r, int64_t count, const float* sums) {
          T* x = state_.hidden.data() + b * decoder_.dim + r;
          sweep(count, [&](int64_t i, auto part) {
            store(x + i, load(x + i, part) + round_to<T>(load(sums + i, part)), part);
          });
        });
  }

  template <class Arranged>
  void feed_forward(const Weight& w, Arranged&& arranged) {
    const int64_t ffn = decoder_.gated ? w.n / 2 : w.n;
    const auto work = [&](int64_t first, int64_t last) {
      // Blocks of rows, so that gate and up are two long streams and not two short ones.
      sums_of(w, first, last, own_.sums.data());
      if (decoder_.gated) sums_of(w, ffn + first, ffn + last, own_.more_sums.data());
      for (int64_t b = 0; b < state_.batch; ++b) {
        const float *gate = own_.sums.data() + b * kBlock, *up = own_.more_sums.data() + b * kBlock;
        T* out = state_.gated.data() + b * state_.ffn + first;
        sweep(last - first, [&](int64_t i, auto part) {
          const Vec g = round_to<T>(load(gate + i, part));
          const Vec y = round_to<T>(silu(g, T{}));
          store(out + i, decoder_.gated ? y * round_to<T>(load(up + i, part)) : y, part);
        });
      }
    };
    thread_.stage(ffn, kBlock, arranged, work, [&] { ahead_.fetch(); });
  }

  // QK norm, RoPE, the cache write and attention, a key/value head of a sequence at a time.
  void attend(const Layer<T>& layer) {
    const int64_t heads = layer.kv_heads, items = static_cast<int64_t>(state_.runs.size()) * heads;
    with_half(decoder_.head_dim, [&](auto half) {
      const auto nothing = [] {};
      thread_.stage(items, 1, nothing, [&](int64_t i, int64_t) {
        attend_head(layer, state_.runs[i / heads], i % heads, half);
      }, [&] { ahead_.fetch(); });
    });
  }

  template <class Half>
  void attend_head(const Layer<T>& layer, const Run& run, int64_t head, Half half) {
    const int64_t d = decoder_.head_dim, group = layer.q_heads / layer.kv_heads;
    const int64_t cached = (run.sequence * layer.kv_heads + head) * decoder_.max_length * d;
    T *keys = layer.keys + cached, *values = layer.values + cached;
    T* queries = own_.queries.data();
    for (int64_t t = 0; t < run.count; ++t) {
      const int64_t position = run.position + t;
      const float* rotation = decoder_.rope_table + position * d;
      const T* qkv = state_.qkv.data() + (run.first + t) * state_.qkv_width;
      head_forward(qkv + (layer.q_heads + head) * d, layer.k_norm, rotation, keys + position * d,
                   half, decoder_.eps);
      std::memcpy(values + position * d, qkv + (layer.q_heads + layer.kv_heads + head) * d,
                  d * sizeof(T));
      for (int64_t g = 0; g < group; ++g)
        head_forward(qkv + (head * group + g) * d, layer.q_norm, rotation,
                     queries + (t * group + g) * d, half, decoder_.eps);
    }
    T* out = state_.attended.data() + run.first * state_.q_width + head * group * d;
    const Tile<T> tile{{queries, group, group * d, d},
                       run.count * group,
                       {keys, d, nullptr},
                       {values, d, nullptr},
                       {run.position, group, nullptr},
                       d,
                       1.0f / std::sqrt(static_cast<float>(d)),
                       true};
    attend_tokens(tile, {out, group, state_.q_width, d}, own_.attention.data());
  }

  const Decoder<T>& decoder_;
  State<T>& state_;
  Scratch<T>& own_;
  TeamThread& thread_;
  Ahead ahead_;  // of the weight that comes next
  T* logits_;
  const bool chooses_;
};

void check_within(const char* name, const Tensor& index, int64_t limit, const char* what) {
  const int64_t* at = data<const int64_t>(index);
  for (int64_t i = 0; i < index.numel(); ++i)
    if (at[i] < 0 || at[i] >= limit)
      refuse(name, " must be in [0, ", limit, ") (", what, "), got ", at[i]);
}

Tensor decode_step_fwd(const Tensor& table, const Tensor& tokens, const Tensor& positions,
                       Optional sequences, Tensor arena, const Tensor& offsets,
                       const Tensor& rope_table, int64_t max_length, int64_t vocab_size, bool gated,
                       double eps, int64_t model_dim, int64_t qkv_width, int64_t ffn_dim,
                       int64_t /*batch*/, Optional chosen) {
  const int64_t batch = tokens.size(0);
  Tensor logits = output(arena, {batch, vocab_size});
  with_dtype(arena, [&](auto t) {
    using T = decltype(t);
    Decoder<T> decoder(table, arena, offsets);
    decoder.rope_table = data<const float>(rope_table);
    decoder.head_dim = rope_table.size(1);
    decoder.max_length = max_length;
    decoder.dim = model_dim;
    decoder.gated = gated;
    decoder.eps = static_cast<float>(eps);
    check_within("tokens", tokens, decoder.embedding.n, "the vocabulary");
    check_within("positions", positions, rope_table.size(0), "rope_table's length");
    check_within("positions", positions, max_length, "the cache's max_length");
    const int64_t* of = sequences ? data<const int64_t>(*sequences) : nullptr;
    State<T> state(decoder, runs_of(data<const int64_t>(positions), of, batch), batch, qkv_width,
                   ffn_dim);
    for (int64_t b = 0; b < batch; ++b)
      dense_row(decoder.embedding, data<const int64_t>(tokens)[b],
                state.hidden.data() + b * decoder.dim);
    const int threads = static_cast<int>(torch::stable::get_num_threads());
    std::vector<Scratch<T>> scratch;
    scratch.reserve(threads);
    for (int i = 0; i < threads; ++i) scratch.emplace_back(decoder, state);
    with_thread_team(threads, [&](TeamThread thread, int number) {
      Step<T>(decoder, state, scratch[number], thread, data<T>(logits),
              chosen.has_value())
          .run();
    });
    if (!chosen) return;
    for (int64_t b = 0; b < batch; ++b) {
      Best best;
      for (const Scratch<T>& own : scratch) best.meet(own.best[b]);
      data<int64_t>(*chosen)[b] = best.token;
    }
  });
  return logits;
}

}  // namespace

ELMKERNELS_IMPL(m) { m.impl("decode_step_fwd", TORCH_BOX(&decode_step_fwd)); }
