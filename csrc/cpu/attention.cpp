// attention: softmax(scale q k^T) v, causal, grouped-query. A tile is up to 256 rows: some tokens
// of all query heads that share a key/value head, so that gathering its keys costs a few percent.
#include "cpu/attention/few_rows_bwd.h"
#include "cpu/attention/visible.h"
#include "cpu/op.h"

namespace {

constexpr int64_t kRows = 256;  // of a tile, if there is so much work
constexpr int64_t kItems = 16;  // of the backward, if their chunks of keys stay this long:
constexpr int64_t kLeastChunk = 256;
constexpr int64_t kWorth = 1'000'000;  // operations: some 10 us, beside 3 to wake a thread

// fn(T{}) for the element type of q. Of a library with AMX bfloat16 alone is asked for: it has no
// tiles of others.
template <class Fn>
void with_library_dtype(const Tensor& q, Fn&& fn) {
#if defined(ELMKERNELS_AMX)
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16, "tiles take bfloat16");
  fn(bf16{});
#else
  with_dtype(q, fn);
#endif
}

// A tensor [batch, length, heads, head_dim].
template <class T>
struct Heads {
  T* data;
  int64_t batch, length, head;

  explicit Heads(const Tensor& x)
      : data(::data<T>(x)), batch(x.stride(0)), length(x.stride(1)), head(x.stride(2)) {}

  T* at(const Sequence& s, int64_t h) const {
    return data + s.batch * batch + s.start * length + h * head;
  }
  // From one token on, `group` heads from h on of each.
  TileRows<T> rows(const Sequence& s, int64_t h, int64_t token, int64_t group) const {
    return {at(s, h) + token * length, group, length, head};
  }
};

// The same for lse [batch, heads, length].
template <class T>
struct Statistics {
  T* data;
  int64_t heads, length;

  TileRows<T> rows(const Sequence& s, int64_t h, int64_t token, int64_t group) const {
    return {data + (s.batch * heads + h) * length + s.start + token, group, 1, length};
  }
};

// Some tokens (of the backward: keys) of a sequence, and what of them says how long they take.
struct Piece {
  int64_t sequence, first, cost;
};

void dearest_first(std::vector<Piece>& pieces) {
  if (pieces.size() < 2) return;
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
}

// Fewer tokens a tile if threads would go without one. A row's result doesn't depend on it.
int64_t tokens_of_a_tile(const Visible& visible, int64_t group, int64_t kv_heads,
                         int64_t operations) {
  const int64_t wanted = operations < kWorth ? 1 : 4 * torch::stable::get_num_threads();
  int64_t tokens = std::clamp<int64_t>(kRows / group, 1, visible.longest());
  const auto tiles = [&] {
    int64_t count = 0;
    for (const Sequence& s : visible.sequences()) count += (s.lq + tokens - 1) / tokens;
    return count;
  };
  while (tokens > 4 && tiles() * kv_heads < wanted) tokens = (tokens + 1) / 2;
  return tokens;
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         Optional key_mask, Optional offsets, Optional cu_seqlens,
                                         double scale) {
  const int64_t batch = q.size(0), lq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(2), group = heads / kv_heads;
  Tensor out = output_like(q);
  Tensor lse = torch::stable::new_empty(q, {batch, heads, lq}, ScalarType::Float);
  const Visible visible(q, k, key_mask, offsets, cu_seqlens);
  const auto& sequences = visible.sequences();
  const int64_t operations = visible.operations(heads, head_dim);
  const int64_t tokens = tokens_of_a_tile(visible, group, kv_heads, operations);
  std::vector<Piece> pieces;
  for (const Sequence& s : sequences)
    for (int64_t first = 0; first < s.lq; first += tokens)
      pieces.push_back({&s - sequences.data(), first, s.before + std::min(first + tokens, s.lq)});
  dearest_first(pieces);
  with_library_dtype(q, [&](auto t) {
    using T = decltype(t);
    const Heads<const T> queries(q), keys(k), values(v);
    const Heads<T> outs(out);
    const Statistics<float> lses{data<float>(lse), heads, lq};
    const auto items = static_cast<int64_t>(pieces.size()) * kv_heads;
    parallel_queue(items, operations, kWorth, [&](auto&& next) {
      const auto scratch = floats(attend_scratch(tokens * group, head_dim));
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t first = pieces[item / kv_heads].first, h = item % kv_heads;
        const Sequence& s = sequences[pieces[item / kv_heads].sequence];
        const Tile<T> tile{queries.rows(s, h * group, first, group),
                           std::min(tokens, s.lq - first) * group,
                           visible.seen(s, keys.at(s, h), keys.length),
                           visible.seen(s, values.at(s, h), values.length),
                           visible.limits(s, first, group),
                           head_dim,
                           static_cast<float>(scale),
                           s.lq * group <= kTileRows};
        attend_tile(tile, outs.rows(s, h * group, first, group),
                    lses.rows(s, h * group, first, group), scratch.get());
      }
    });
  });
  return {out, lse};
}

// How the backward cuts a sequence: an item is a chunk of the keys of one head. It owns their dk
// and dv, and adds to dq by partials of its own if there are several chunks.
struct Cut {
  int64_t chunks, chunk, partials;  // the last: where the sequence's partials begin
};

// The number of chunks goes by a sequence's share of all work. That depends on shapes alone, and so
// does the order of every sum.
std::vector<Cut> cuts(const Visible& visible, int64_t heads, int64_t kv_heads, int64_t width) {
  int64_t all = 0, partials = 0;
  for (const Sequence& s : visible.sequences()) all += Visible::pairs(s);
  std::vector<Cut> found;
  found.reserve(visible.sequences().size() + 1);
  for (const Sequence& s : visible.sequences()) {
    const int64_t items = kItems * Visible::pairs(s) / std::max<int64_t>(1, all * kv_heads);
    const int64_t most = std::max<int64_t>(1, s.lk);
    const int64_t chunks = std::clamp<int64_t>(std::min(items, s.lk / kLeastChunk), 1, most);
    found.push_back({chunks, round_up((s.lk + chunks - 1) / chunks, kKeyBlock), partials});
    if (chunks > 1) partials += chunks * s.lq * heads * width;
  }
  found.push_back({0, 0, partials});
  return found;
}

// What the backward reads and writes.
template <class T>
struct BackwardTensors {
  Heads<const T> q, k, v, out, dout;
  Statistics<const float> lse;
  Heads<T> dq, dk, dv;
};

// One backward: what all of its items share.
template <class T>
class Backward {
 public:
  Backward(const BackwardTensors<T>& x, const Visible& visible, const std::vector<Cut>& cut,
           const Tensor& q, const Tensor& k, double scale)
      : x_(x),
        visible_(visible),
        cut_(cut),
        heads_(q.size(2)),
        kv_heads_(k.size(2)),
        head_dim_(q.size(3)),
        scale_(static_cast<float>(scale)),
        partials_(floats(std::max<int64_t>(1, cut.back().partials))) {}

  void run() {
    const auto pieces = cut_keys();
    int64_t largest = 0;
    for (const Cut& c : cut_) largest = std::max(largest, c.chunk);
    const int64_t operations = visible_.operations(heads_, head_dim_) * 5 / 2;
    const auto items = static_cast<int64_t>(pieces.size()) * kv_heads_;
    parallel_queue(items, operations, kWorth, [&](auto&& next) {
      const auto scratch = floats(attend_bwd_scratch(head_dim_));
      const auto sums = floats(2 * largest * width_);
      for (int64_t item; (item = next()) >= 0;)
        run_item(pieces[item / kv_heads_], item % kv_heads_, sums.get(), scratch.get());
    });
    for (size_t i = 0; i < visible_.sequences().size(); ++i)
      if (cut_[i].chunks > 1) add_partials(visible_.sequences()[i], cut_[i]);
  }

 private:
  // What an item works on: one key/value head h, and of it the keys [begin, end) that are seen.
  struct Item {
    const Sequence& sequence;
    const Cut& cut;
    int64_t h, begin, end;
  };

  std::vector<Piece> cut_keys() const {
    const auto& sequences = visible_.sequences();
    std::vector<Piece> pieces;
    pieces.reserve(sequences.size());
    for (size_t i = 0; i < sequences.size(); ++i)
      for (int64_t c = 0; c < cut_[i].chunks; ++c) {
        const int64_t begin = c * cut_[i].chunk, left = sequences[i].lk - begin;
        pieces.push_back({static_cast<int64_t>(i), begin, std::min(cut_[i].chunk, left) * left});
      }
    dearest_first(pieces);
    return pieces;
  }

  // sums: floats for dk and dv of a chunk, unless they are written at once.
  void run_item(const Piece& piece, int64_t h, float* sums, float* scratch) const {
    const Sequence& s = visible_.sequences()[piece.sequence];
    const Cut& cut = cut_[piece.sequence];
    const int64_t seen = visible_.limit(s, s.lq - 1), begin = piece.first;
    const Item item{s, cut, h, begin, std::clamp(seen, begin, std::max(begin, begin + cut.chunk))};
    const SeenRows<T> dk = visible_.seen(s, x_.dk.at(s, h), x_.dk.length);
    const SeenRows<T> dv = visible_.seen(s, x_.dv.at(s, h), x_.dv.length);
    const int64_t keys = item.end - begin, room = round_up(keys, kAmxRows) * width_;
    float *dkeys = sums, *dvalues = sums + room;
    const bool few = few_rows<T>(s.lq * group_, head_dim_);
    if (!few) std::fill(dkeys, dvalues + room, 0.0f);
    const int64_t tiles = slices_ * ((s.lq + tokens_ - 1) / tokens_);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = i / slices_ * tokens_, count = std::min(tokens_, s.lq - first);
      if (cut.chunks > 1 && visible_.limit(s, first + count - 1) <= begin) continue;
      const int64_t head = h * group_ + i % slices_ * most_;
      const int64_t some = std::min(most_, (h + 1) * group_ - head);
      const TileBwd<T> tile = tile_of(item, first, head, some);
      const auto dq = dq_of(item, first, head, some);
      if constexpr (Operand<T>::per == 1)
        if (few) {
          attend_few_bwd(tile, dk, dv, dq, scratch);
          continue;
        }
      attend_tile_bwd(tile, dkeys, dvalues, dq, scratch);
    }
    const Vec shrink = vec(scale_);
    for (int64_t j = 0; j < keys && !few; ++j)
      sweep(head_dim_, [&](int64_t d, auto part) {
        store(dk(begin + j) + d, load(dkeys + j * width_ + d, part) * shrink, part);
        store(dv(begin + j) + d, load(dvalues + j * width_ + d, part), part);
      });
    if (begin == 0)
      visible_.unseen(s, [&](int64_t j) {
        std::memset(x_.dk.at(s, h) + j * x_.dk.length, 0, head_dim_ * sizeof(T));
        std::memset(x_.dv.at(s, h) + j * x_.dv.length, 0, head_dim_ * sizeof(T));
      });
  }

  // The tile of `some` heads from `head` on, from token `first` on.
  TileBwd<T> tile_of(const Item& item, int64_t first, int64_t head, int64_t some) const {
    const Sequence& s = item.sequence;
    const Tile<T> tile{x_.q.rows(s, head, first, some),
                       std::min(tokens_, s.lq - first) * some,
                       visible_.seen(s, x_.k.at(s, item.h), x_.k.length),
                       visible_.seen(s, x_.v.at(s, item.h), x_.v.length),
                       visible_.limits(s, first, some),
                       head_dim_,
                       scale_,
                       s.lq * group_ <= kTileRows};
    return {tile,
            x_.out.rows(s, head, first, some),
            x_.dout.rows(s, head, first, some),
            x_.lse.rows(s, head, first, some),
            item.begin,
            item.end};
  }

  // dq(r, row) of that tile: to its place, or to the item's partials if there are several chunks.
  auto dq_of(const Item& item, int64_t first, int64_t head, int64_t some) const {
    const Cut& cut = item.cut;
    const int64_t token = item.begin / cut.chunk * item.sequence.lq + first;
    float* partial = partials_.get() + cut.partials + (token * heads_ + head) * width_;
    const TileRows<float> partials{partial, some, heads_ * width_, width_};
    const TileRows<T> dq = x_.dq.rows(item.sequence, head, first, some);
    const Vec shrink = vec(scale_);
    return [=, this, several = cut.chunks > 1](int64_t r, const float* from) {
      sweep(head_dim_, [&](int64_t d, auto part) {
        if (several) return store(partials(r) + d, load(from + d, part), part);
        store(dq(r) + d, load(from + d, part) * shrink, part);
      });
    };
  }

  // The partials of a sequence, chunk after chunk.
  void add_partials(const Sequence& s, const Cut& cut) const {
    const int64_t chunk = s.lq * heads_ * width_;
    const Vec shrink = vec(scale_);
    parallel_rows(s.lq, 2 * cut.chunks * heads_ * width_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / tokens_ * tokens_;
        const int64_t last = visible_.limit(s, std::min(first + tokens_, s.lq) - 1);
        const int64_t count = std::min(cut.chunks, (last + cut.chunk - 1) / cut.chunk);
        for (int64_t h = 0; h < heads_; ++h)
          sweep(head_dim_, [&](int64_t d, auto part) {
            const float* from = partials_.get() + cut.partials + (i * heads_ + h) * width_ + d;
            Vec total = vec(0.0f);
            for (int64_t c = 0; c < count; ++c) total = total + load(from + c * chunk, part);
            store(x_.dq.at(s, h) + i * x_.dq.length + d, total * shrink, part);
          });
      }
    });
  }

  const BackwardTensors<T>& x_;
  const Visible& visible_;
  const std::vector<Cut>& cut_;
  const int64_t heads_, kv_heads_, head_dim_;
  const float scale_;
  const int64_t width_ = round_up(head_dim_, Vec::size), group_ = heads_ / kv_heads_;
  // Of a group of more than kBwdRows heads a tile takes some, so that there are slices of a group.
  const int64_t most_ = std::min(group_, kBwdRows), slices_ = (group_ + most_ - 1) / most_;
  const int64_t tokens_ = kBwdRows / most_;
  const std::unique_ptr<float[], Free> partials_;
};

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse,
                                                 Optional key_mask, Optional offsets,
                                                 Optional cu_seqlens, double scale) {
  const int64_t heads = q.size(2), width = round_up(q.size(3), Vec::size);
  Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  const Visible visible(q, k, key_mask, offsets, cu_seqlens);
  const auto cut = cuts(visible, heads, k.size(2), width);
  with_library_dtype(q, [&](auto t) {
    using T = decltype(t);
    const BackwardTensors<T> tensors{
        Heads<const T>(q),   Heads<const T>(k),    Heads<const T>(v),
        Heads<const T>(out), Heads<const T>(dout), {data<const float>(lse), heads, q.size(1)},
        Heads<T>(dq),        Heads<T>(dk),         Heads<T>(dv)};
    Backward<T>(tensors, visible, cut, q, k, scale).run();
  });
  return {dq, dk, dv};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}
