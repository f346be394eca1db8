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

// Queries that see the same keys but for how many of them: a row of a batch, or a document.
struct Row {
  int64_t batch, start;  // its first token lies there
  int64_t lq, lk;
  int64_t first;  // how many keys lie before those of its own queries
};

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

  T* at(const Row& row, int64_t h) const {
    return data + row.batch * batch + row.start * length + h * head;
  }

  // The rows of a tile: from one token on, `group` heads from h on of each.
  auto rows(const Row& row, int64_t h, int64_t token, int64_t group) const {
    T* first = at(row, h) + token * length;
    return [=, *this](int64_t r) { return first + r / group * length + r % group * head; };
  }
};

// Which keys the queries see: of each row those that aren't padding, in their order, so that
// padding is never read, and every query sees a first few of them.
class Sight {
 public:
  Sight(const Tensor& q, const Tensor& k, const Optional& key_mask, const Optional& offsets,
        const Optional& cu_seqlens)
      : lk_(k.size(1)), masked_(key_mask.has_value()) {
    const int64_t batch = q.size(0), lq = q.size(1);
    if (cu_seqlens) {
      documents(*cu_seqlens, lq);
      return;
    }
    rows_.assign(static_cast<size_t>(batch), {0, 0, lq, lk_, lk_ - lq});
    for (int64_t b = 0; b < batch; ++b) rows_[b].batch = b;
    if (offsets) {
      const auto* at = static_cast<const int64_t*>(offsets->data_ptr());
      for (auto& row : rows_) {
        row.first = at[row.batch * offsets->stride(0)];
        STD_TORCH_CHECK(row.first >= 0 && row.first <= lk_ - lq, "offsets must be in [0, ",
                        lk_ - lq + 1, ") (k's length less q's), got ", row.first);
      }
    }
    if (!masked_) return;
    const bool* mask = static_cast<const bool*>(key_mask->data_ptr());
    keys_.resize(static_cast<size_t>(batch * lk_));
    counts_.resize(static_cast<size_t>(batch * (lk_ + 1)));
    for (int64_t b = 0; b < batch; ++b) {
      int64_t count = 0;
      for (int64_t j = 0; j < lk_; ++j) {
        counts_[b * (lk_ + 1) + j] = count;
        if (mask[b * key_mask->stride(0) + j * key_mask->stride(1)]) keys_[b * lk_ + count++] = j;
      }
      counts_[b * (lk_ + 1) + lk_] = count;
    }
  }

  const std::vector<Row>& rows() const { return rows_; }

  // How many keys query i of a row sees.
  int64_t limit(const Row& row, int64_t i) const {
    const int64_t end = row.first + i + 1;
    return masked_ ? counts_[row.batch * (lk_ + 1) + end] : end;
  }
  // The index of the j-th key that is seen.
  int64_t key(const Row& row, int64_t j) const { return masked_ ? keys_[row.batch * lk_ + j] : j; }

  // fn(key) for every key of a row that no query sees.
  template <class Fn>
  void unseen(const Row& row, Fn&& fn) const {
    const int64_t end = row.first + row.lq;
    const int64_t* counts = masked_ ? counts_.data() + row.batch * (lk_ + 1) : nullptr;
    for (int64_t j = masked_ ? 0 : end; j < row.lk; ++j)
      if (j >= end || counts[j] == counts[j + 1]) fn(j);
  }

  static int64_t pairs(const Row& row) { return row.lq * (row.first + (row.lq + 1) / 2); }

  int64_t operations(int64_t q_heads, int64_t head_dim) const {
    int64_t sum = 0;
    for (const Row& row : rows_) sum += pairs(row);
    return 4 * sum * q_heads * head_dim;
  }

  int64_t longest() const {
    int64_t most = 1;
    for (const Row& row : rows_) most = std::max(most, row.lq);
    return most;
  }

 private:
  // Each document that isn't empty is a row.
  void documents(const Tensor& cu_seqlens, int64_t total) {
    const auto* at = static_cast<const int64_t*>(cu_seqlens.data_ptr());
    const int64_t stride = cu_seqlens.stride(0), count = cu_seqlens.size(0) - 1;
    STD_TORCH_CHECK(at[0] == 0 && at[count * stride] == total,
                    "cu_seqlens must be rising from 0 to ", total, ", got ", at[0], " to ",
                    at[count * stride]);
    rows_.reserve(static_cast<size_t>(count));
    for (int64_t d = 0; d < count; ++d) {
      const int64_t begin = at[d * stride], end = at[(d + 1) * stride];
      STD_TORCH_CHECK(begin <= end, "cu_seqlens must be rising from 0 to ", total, ", got ", begin,
                      " before ", end);
      if (begin < end) rows_.push_back({0, begin, end - begin, end - begin, 0});
    }
  }

  int64_t lk_;
  bool masked_;
  std::vector<Row> rows_;
  std::vector<int64_t> keys_, counts_;
};

// Some tokens of a row, and what of them says how long they take.
struct Piece {
  int64_t row, first, cost;
};

void dearest_first(std::vector<Piece>& pieces) {
  if (pieces.size() < 2) return;
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         Optional key_mask, Optional offsets, Optional cu_seqlens,
                                         double scale) {
  const int64_t batch = q.size(0), lq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(2), group = heads / kv_heads;
  Tensor out = output_like(q);
  Tensor lse = torch::stable::new_empty(q, {batch, heads, lq}, ScalarType::Float);
  const Sight sight(q, k, key_mask, offsets, cu_seqlens);
  const auto& rows = sight.rows();
  const int64_t operations = sight.operations(heads, head_dim);
  // Fewer tokens a tile where threads would go without one; a row's result doesn't depend on it.
  const int64_t wanted = operations < kWorth ? 1 : 4 * torch::stable::get_num_threads();
  int64_t tokens = std::clamp<int64_t>(kRows / group, 1, sight.longest());
  const auto tiles = [&] {
    int64_t count = 0;
    for (const Row& row : rows) count += (row.lq + tokens - 1) / tokens;
    return count;
  };
  while (tokens > 4 && tiles() * kv_heads < wanted) tokens = (tokens + 1) / 2;
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(tiles()));
  for (const Row& row : rows)
    for (int64_t first = 0; first < row.lq; first += tokens)
      pieces.push_back({&row - rows.data(), first, row.first + std::min(first + tokens, row.lq)});
  dearest_first(pieces);
  with_dtype(q, [&](auto t) {
    using T = decltype(t);
    const Heads<const T> queries(q), keys(k), values(v);
    const Heads<T> outs(out);
    const auto items = static_cast<int64_t>(pieces.size()) * kv_heads;
    parallel_queue(items, operations, kWorth, [&](auto&& next) {
      const auto scratch = floats(attend_scratch(tokens * group, head_dim));
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t first = pieces[item / kv_heads].first, h = item % kv_heads;
        const Row& row = rows[pieces[item / kv_heads].row];
        const int64_t count = std::min(tokens, row.lq - first) * group;
        float* statistic =
            data<float>(lse) + (row.batch * heads + h * group) * lq + row.start + first;
        const T *key = keys.at(row, h), *value = values.at(row, h);
        attend_tile<T>(
            queries.rows(row, h * group, first, group), count,
            [&](int64_t j) { return key + sight.key(row, j) * keys.length; },
            [&](int64_t j) { return value + sight.key(row, j) * values.length; },
            [&](int64_t r) { return sight.limit(row, first + r / group); }, head_dim,
            static_cast<float>(scale), outs.rows(row, h * group, first, group),
            [&](int64_t r, float sum) { statistic[r % group * lq + r / group] = sum; },
            row.lq * group <= kTileRows, scratch.get());
      }
    });
  });
  return {out, lse};
}

// How the backward cuts a row: an item is a chunk of the keys of one head. It owns their dk and dv,
// and adds to dq by a partial of its own where there are several.
struct Cut {
  int64_t chunks, chunk, partials;  // where the row's partials begin
};

// By its share of all work, which depends on the shape alone, and so does every order.
std::vector<Cut> cuts(const Sight& sight, int64_t heads, int64_t kv_heads, int64_t width) {
  int64_t all = 0, partials = 0;
  for (const Row& row : sight.rows()) all += Sight::pairs(row);
  std::vector<Cut> found;
  found.reserve(sight.rows().size() + 1);
  for (const Row& row : sight.rows()) {
    const int64_t items = kItems * Sight::pairs(row) / std::max<int64_t>(1, all * kv_heads);
    const int64_t most = std::max<int64_t>(1, row.lk);
    const int64_t chunks = std::clamp<int64_t>(std::min(items, row.lk / kLeastChunk), 1, most);
    found.push_back({chunks, round_up((row.lk + chunks - 1) / chunks, kKeyBlock), partials});
    if (chunks > 1) partials += chunks * row.lq * heads * width;
  }
  found.push_back({0, 0, partials});
  return found;
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse,
                                                 Optional key_mask, Optional offsets,
                                                 Optional cu_seqlens, double scale) {
  const int64_t lq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(2), group = heads / kv_heads;
  const int64_t width = round_up(head_dim, Vec::size);
  Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  const Sight sight(q, k, key_mask, offsets, cu_seqlens);
  const auto& rows = sight.rows();
  const int64_t operations = sight.operations(heads, head_dim) * 5 / 2;
  const auto cut = cuts(sight, heads, kv_heads, width);
  std::vector<Piece> pieces;
  pieces.reserve(rows.size());
  int64_t largest = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    largest = std::max(largest, cut[i].chunk);
    for (int64_t c = 0; c < cut[i].chunks; ++c) {
      const int64_t begin = c * cut[i].chunk, keys = std::min(cut[i].chunk, rows[i].lk - begin);
      pieces.push_back({static_cast<int64_t>(i), begin, keys * (rows[i].lk - begin)});
    }
  }
  dearest_first(pieces);
  // Of a group of more than 64 heads a tile takes some.
  const int64_t most = std::min(group, kBwdRows), slices = (group + most - 1) / most;
  const int64_t tokens = kBwdRows / most;
  const auto partials = floats(std::max<int64_t>(1, cut.back().partials));
  with_dtype(q, [&](auto t) {
    using T = decltype(t);
    const Heads<const T> queries(q), keys(k), values(v), outs(out), douts(dout);
    const Heads<T> dqs(dq), dks(dk), dvs(dv);
    const Vec shrink = vec(static_cast<float>(scale));
    const auto items = static_cast<int64_t>(pieces.size()) * kv_heads;
    parallel_queue(items, operations, kWorth, [&](auto&& next) {
      const auto scratch = floats(attend_bwd_scratch(head_dim));
      const auto sums = floats(2 * largest * width);
      for (int64_t item; (item = next()) >= 0;) {
        const Piece& piece = pieces[item / kv_heads];
        const Row& row = rows[piece.row];
        const Cut& share = cut[piece.row];
        const int64_t h = item % kv_heads, begin = piece.first;
        const int64_t seen = sight.limit(row, row.lq - 1);
        const int64_t end = std::clamp(seen, begin, std::max(begin, begin + share.chunk));
        const auto key_at = [&, from = keys.at(row, h)](int64_t j) {
          return from + sight.key(row, j) * keys.length;
        };
        const auto value_at = [&, from = values.at(row, h)](int64_t j) {
          return from + sight.key(row, j) * values.length;
        };
        T *dkey = dks.at(row, h), *dvalue = dvs.at(row, h);
        const auto dkey_at = [&](int64_t j) { return dkey + sight.key(row, j) * dks.length; };
        const auto dvalue_at = [&](int64_t j) { return dvalue + sight.key(row, j) * dvs.length; };
        const bool few = few_rows<T>(row.lq * group, head_dim);
        float *dkeys = sums.get(), *dvalues = dkeys + (end - begin) * width;
        if (!few) std::fill(dkeys, dvalues + (end - begin) * width, 0.0f);
        for (int64_t tile = 0; tile < slices * ((row.lq + tokens - 1) / tokens); ++tile) {
          const int64_t first = tile / slices * tokens, count = std::min(tokens, row.lq - first);
          const int64_t head = h * group + tile % slices * most;
          const int64_t some = std::min(most, (h + 1) * group - head);
          if (share.chunks > 1 && sight.limit(row, first + count - 1) <= begin) continue;
          const auto q_at = queries.rows(row, head, first, some);
          const auto out_at = outs.rows(row, head, first, some);
          const auto dout_at = douts.rows(row, head, first, some);
          const auto dq_at = dqs.rows(row, head, first, some);
          const float* statistic =
              data<float>(lse) + (row.batch * heads + head) * lq + row.start + first;
          const auto lse_of = [&](int64_t r) { return statistic[r % some * lq + r / some]; };
          const auto limit = [&](int64_t r) { return sight.limit(row, first + r / some); };
          float* partial = partials.get() + share.partials +
                           ((begin / share.chunk * row.lq + first) * heads + head) * width;
          const auto add = [&](int64_t r, const float* from) {
            float* sum = partial + (r / some * heads + r % some) * width;
            sweep(head_dim, [&](int64_t d, auto part) {
              if (share.chunks > 1) return store(sum + d, load(from + d, part), part);
              store(dq_at(r) + d, load(from + d, part) * shrink, part);
            });
          };
          if constexpr (Operand<T>::per == 1)
            if (few) {
              attend_few_bwd<T>(q_at, out_at, dout_at, lse_of, count * some, key_at, value_at,
                                limit, begin, end, head_dim, static_cast<float>(scale), dkey_at,
                                dvalue_at, add, scratch.get());
              continue;
            }
          attend_tile_bwd<T>(q_at, out_at, dout_at, lse_of, count * some, key_at, value_at, limit,
                             begin, end, head_dim, static_cast<float>(scale), dkeys, dvalues, add,
                             scratch.get());
        }
        for (int64_t j = begin; j < end && !few; ++j)
          sweep(head_dim, [&, from = (j - begin) * width](int64_t d, auto part) {
            store(dkey_at(j) + d, load(dkeys + from + d, part) * shrink, part);
            store(dvalue_at(j) + d, load(dvalues + from + d, part), part);
          });
        if (begin == 0)
          sight.unseen(row, [&](int64_t at) {
            std::memset(dkey + at * dks.length, 0, head_dim * sizeof(T));
            std::memset(dvalue + at * dvs.length, 0, head_dim * sizeof(T));
          });
      }
    });
    for (size_t n = 0; n < rows.size(); ++n) {
      const Row& row = rows[n];
      const Cut& share = cut[n];
      if (share.chunks == 1) continue;
      const int64_t part = row.lq * heads * width;
      parallel_rows(row.lq, 2 * share.chunks * heads * width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i / tokens * tokens;
          const int64_t last = sight.limit(row, std::min(first + tokens, row.lq) - 1);
          const int64_t count = std::min(share.chunks, (last + share.chunk - 1) / share.chunk);
          for (int64_t h = 0; h < heads; ++h)
            sweep(head_dim, [&](int64_t d, auto part_of) {
              const float* from = partials.get() + share.partials + (i * heads + h) * width + d;
              Vec total = vec(0.0f);
              for (int64_t c = 0; c < count; ++c) total = total + load(from + c * part, part_of);
              store(dqs.at(row, h) + i * dqs.length + d, total * shrink, part_of);
            });
        }
      });
    }
  });
  return {dq, dk, dv};
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}
