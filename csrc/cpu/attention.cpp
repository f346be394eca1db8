// attention: softmax(scale q k^T) v, causal, grouped-query. A tile is up to 256 rows: some tokens
// of all query heads that share a key/value head, so that packing its keys costs a few percent.
#include "attend_bwd.h"
#include "op.h"

namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kRows = 256;  // of a tile, where there is so much work
constexpr int64_t kItems = 16;  // of the backward, if their chunks of keys stay this long:
constexpr int64_t kLeastChunk = 256;
constexpr int64_t kWorth = 1'000'000;  // operations: some 10 us, beside 3 to wake a thread

// A tensor [batch, length, heads, head_dim].
template <class T>
struct Heads {
  T* data;
  int64_t batch, length, head;

  explicit Heads(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())),
        batch(x.stride(0)),
        length(x.stride(1)),
        head(x.stride(2)) {}

  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }

  // The rows of a tile: from one token on, `group` heads from h on of each.
  auto rows(int64_t b, int64_t h, int64_t token, int64_t group) const {
    T* first = at(b, h) + token * length;
    return [=, *this](int64_t r) { return first + r / group * length + r % group * head; };
  }
};

// Which keys the queries see: of each batch row those that aren't padding, in their order, so that
// padding is never read, and every query sees a first few of them.
class Sight {
 public:
  Sight(const Tensor& q, const Tensor& k, const Optional& key_mask, const Optional& offsets)
      : batch_(q.size(0)), lq_(q.size(1)), lk_(k.size(1)), masked_(key_mask.has_value()) {
    first_.assign(static_cast<size_t>(batch_), lk_ - lq_);
    if (offsets) {
      const auto* at = static_cast<const int64_t*>(offsets->data_ptr());
      for (int64_t b = 0; b < batch_; ++b) {
        first_[b] = at[b * offsets->stride(0)];
        STD_TORCH_CHECK(first_[b] >= 0 && first_[b] <= lk_ - lq_, "offsets must be in [0, ",
                        lk_ - lq_ + 1, ") (k's length less q's), got ", first_[b]);
      }
    }
    if (!masked_) return;
    const bool* mask = static_cast<const bool*>(key_mask->data_ptr());
    keys_.resize(static_cast<size_t>(batch_ * lk_));
    counts_.resize(static_cast<size_t>(batch_ * (lk_ + 1)));
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t count = 0;
      for (int64_t j = 0; j < lk_; ++j) {
        counts_[b * (lk_ + 1) + j] = count;
        if (mask[b * key_mask->stride(0) + j * key_mask->stride(1)]) keys_[b * lk_ + count++] = j;
      }
      counts_[b * (lk_ + 1) + lk_] = count;
    }
  }

  // How many keys query i sees.
  int64_t limit(int64_t b, int64_t i) const {
    const int64_t end = first_[b] + i + 1;
    return masked_ ? counts_[b * (lk_ + 1) + end] : end;
  }
  // The index of the j-th key that is seen.
  int64_t key(int64_t b, int64_t j) const { return masked_ ? keys_[b * lk_ + j] : j; }

  // fn(key) for every key of a row that no query sees.
  template <class Fn>
  void unseen(int64_t b, int64_t lq, Fn&& fn) const {
    const int64_t end = first_[b] + lq;
    for (int64_t j = 0; j < lk_; ++j)
      if (j >= end || (masked_ && counts_[b * (lk_ + 1) + j] == counts_[b * (lk_ + 1) + j + 1]))
        fn(j);
  }

  int64_t operations(int64_t q_heads, int64_t head_dim) const {
    int64_t pairs = 0;
    for (int64_t b = 0; b < batch_; ++b) pairs += lq_ * (first_[b] + (lq_ + 1) / 2);
    return 4 * pairs * q_heads * head_dim;
  }

 private:
  int64_t batch_, lq_, lk_;
  bool masked_;
  std::vector<int64_t> first_, keys_, counts_;
};

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         Optional key_mask, Optional offsets, double scale) {
  const int64_t batch = q.size(0), lq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(2), group = heads / kv_heads;
  Tensor out = output_like(q);
  Tensor lse = torch::stable::new_empty(q, {batch, heads, lq}, ScalarType::Float);
  const Sight sight(q, k, key_mask, offsets);
  const int64_t operations = sight.operations(heads, head_dim);
  // Fewer tokens a tile where threads would go without one; a row's result doesn't depend on it.
  const int64_t wanted = operations < kWorth ? 1 : 4 * torch::stable::get_num_threads();
  int64_t tokens = std::clamp<int64_t>(kRows / group, 1, std::max<int64_t>(1, lq));
  while (tokens > 4 && batch * kv_heads * ((lq + tokens - 1) / tokens) < wanted)
    tokens = (tokens + 1) / 2;
  const int64_t tiles = (lq + tokens - 1) / tokens, pairs = batch * kv_heads;
  with_dtype(q, [&](auto t) {
    using T = decltype(t);
    const Heads<const T> queries(q), keys(k), values(v);
    const Heads<T> outs(out);
    parallel_queue(tiles * pairs, operations, kWorth, [&](auto&& next) {
      const auto scratch = floats(attend_scratch(tokens * group, head_dim));
      for (int64_t item; (item = next()) >= 0;) {
        // The last tokens see most keys: they go first.
        const int64_t first = (tiles - 1 - item / pairs) * tokens;
        const int64_t b = item % pairs / kv_heads, h = item % kv_heads;
        const int64_t rows = std::min(tokens, lq - first) * group;
        float* statistic = data<float>(lse) + (b * heads + h * group) * lq + first;
        attend_tile<T>(
            queries.rows(b, h * group, first, group), rows,
            [&](int64_t j) { return keys.at(b, h) + sight.key(b, j) * keys.length; },
            [&](int64_t j) { return values.at(b, h) + sight.key(b, j) * values.length; },
            [&](int64_t r) { return sight.limit(b, first + r / group); }, head_dim,
            static_cast<float>(scale), outs.rows(b, h * group, first, group),
            [&](int64_t r, float value) { statistic[r % group * lq + r / group] = value; },
            lq * group <= kTileRows, scratch.get());
      }
    });
  });
  return {out, lse};
}

// An item is a chunk of the keys of one head: it owns their dk and dv, and adds to dq by a partial
// of its own where there are several. How many depends on the shape alone, and so does every order.
std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse,
                                                 Optional key_mask, Optional offsets,
                                                 double scale) {
  const int64_t batch = q.size(0), lq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t lk = k.size(1), kv_heads = k.size(2), group = heads / kv_heads;
  const int64_t width = round_up(head_dim, Vec::size), pairs = batch * kv_heads;
  Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  const Sight sight(q, k, key_mask, offsets);
  const int64_t operations = sight.operations(heads, head_dim) * 5 / 2;
  const int64_t chunks =
      std::clamp<int64_t>(std::min(kItems / std::max<int64_t>(1, pairs), lk / kLeastChunk), 1, lk);
  const int64_t chunk = round_up((lk + chunks - 1) / chunks, kKeyBlock);
  // Of a group of more than 64 heads a tile takes some.
  const int64_t most = std::min(group, kBwdRows), slices = (group + most - 1) / most;
  const int64_t tokens = kBwdRows / most, part = batch * lq * heads * width;
  const auto partials = floats(chunks > 1 ? chunks * part : 1);
  with_dtype(q, [&](auto t) {
    using T = decltype(t);
    const Heads<const T> queries(q), keys(k), values(v), outs(out), douts(dout);
    const Heads<T> dqs(dq), dks(dk), dvs(dv);
    const Vec shrink = vec(static_cast<float>(scale));
    // Chunks of the first keys, which most queries see, go first.
    parallel_queue(chunks * pairs, operations, kWorth, [&](auto&& next) {
      const auto scratch = floats(attend_bwd_scratch(head_dim));
      const auto sums = floats(2 * chunk * width);
      float *dkeys = sums.get(), *dvalues = sums.get() + chunk * width;
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t c = item / pairs, b = item % pairs / kv_heads, h = item % kv_heads;
        const int64_t begin = c * chunk, seen = sight.limit(b, lq - 1);
        const int64_t end = std::clamp(seen, begin, std::max(begin, std::min(lk, begin + chunk)));
        std::fill(dkeys, dkeys + 2 * chunk * width, 0.0f);
        for (int64_t tile = 0; tile < slices * ((lq + tokens - 1) / tokens); ++tile) {
          const int64_t first = tile / slices * tokens, count = std::min(tokens, lq - first);
          const int64_t head = h * group + tile % slices * most;
          const int64_t some = std::min(most, (h + 1) * group - head);
          if (chunks > 1 && sight.limit(b, first + count - 1) <= begin) continue;
          const float* statistic = data<float>(lse) + (b * heads + head) * lq + first;
          const auto to = dqs.rows(b, head, first, some);
          float* partial = partials.get() + c * part + ((b * lq + first) * heads + head) * width;
          attend_tile_bwd<T>(
              queries.rows(b, head, first, some), outs.rows(b, head, first, some),
              douts.rows(b, head, first, some),
              [&](int64_t r) { return statistic[r % some * lq + r / some]; }, count * some,
              [&](int64_t j) { return keys.at(b, h) + sight.key(b, j) * keys.length; },
              [&](int64_t j) { return values.at(b, h) + sight.key(b, j) * values.length; },
              [&](int64_t r) { return sight.limit(b, first + r / some); }, begin, end, head_dim,
              static_cast<float>(scale), dkeys, dvalues,
              [&](int64_t r, const float* row) {
                float* sum = partial + (r / some * heads + r % some) * width;
                sweep(head_dim, [&](int64_t d, auto part) {
                  if (chunks > 1) return store(sum + d, load(row + d, part), part);
                  store(to(r) + d, load(row + d, part) * shrink, part);
                });
              },
              scratch.get());
        }
        for (int64_t j = begin; j < end; ++j) {
          const int64_t at = sight.key(b, j), row = (j - begin) * width;
          sweep(head_dim, [&](int64_t d, auto part) {
            store(dks.at(b, h) + at * dks.length + d, load(dkeys + row + d, part) * shrink, part);
            store(dvs.at(b, h) + at * dvs.length + d, load(dvalues + row + d, part), part);
          });
        }
        if (c == 0)
          sight.unseen(b, lq, [&](int64_t at) {
            std::memset(dks.at(b, h) + at * dks.length, 0, head_dim * sizeof(T));
            std::memset(dvs.at(b, h) + at * dvs.length, 0, head_dim * sizeof(T));
          });
      }
    });
    if (chunks == 1) return;
    parallel_rows(batch * lq, 2 * chunks * heads * width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / lq, i = row % lq, first = i / tokens * tokens;
        const int64_t last = sight.limit(b, std::min(first + tokens, lq) - 1);
        const int64_t count = std::min(chunks, (last + chunk - 1) / chunk);
        for (int64_t h = 0; h < heads; ++h)
          sweep(head_dim, [&](int64_t d, auto part_of) {
            Vec total = vec(0.0f);
            for (int64_t c = 0; c < count; ++c)
              total =
                  total + load(partials.get() + c * part + (row * heads + h) * width + d, part_of);
            store(data<T>(dq) + (row * heads + h) * head_dim + d, total * shrink, part_of);
          });
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}
