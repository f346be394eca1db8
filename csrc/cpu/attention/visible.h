// Which keys the queries of attention see: by causality, a mask of padding, offsets into a cache,
// or the ends of varlen documents.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/attention/tile.h"
#include "cpu/refuse.h"
#include "shared/tensors.h"

// Queries that see the same keys, except for how many of them: a row of a batch, or a document.
struct Sequence {
  int64_t batch, start;  // where its first token lies
  int64_t lq, lk;
  int64_t before;  // keys before those of its own queries
};

// Keys of padding are left out and the others keep their order. So padding is never read, and every
// query sees a first few of the keys that are left.
class Visible {
 public:
  Visible(const Tensor& q, const Tensor& k, const Optional& key_mask, const Optional& offsets,
          const Optional& cu_seqlens)
      : lk_(k.size(1)), masked_(key_mask.has_value()) {
    const int64_t batch = q.size(0), lq = q.size(1);
    if (cu_seqlens) {
      split(*cu_seqlens, lq);
      return;
    }
    sequences_.assign(static_cast<size_t>(batch), {0, 0, lq, lk_, lk_ - lq});
    for (int64_t b = 0; b < batch; ++b) sequences_[b].batch = b;
    if (offsets) move(*offsets);
    if (masked_) mask(*key_mask, batch);
  }

  const std::vector<Sequence>& sequences() const { return sequences_; }

  // How many of the keys that are left query i of a sequence sees.
  int64_t limit(const Sequence& s, int64_t i) const { return limits(s, i, 1)(0); }
  // The same for the rows of a tile of `group` heads from token `first` on.
  KeyLimit limits(const Sequence& s, int64_t first, int64_t group) const {
    return {s.before + first, group, masked_ ? counts_.data() + s.batch * (lk_ + 1) : nullptr};
  }
  // Those keys, or what belongs to them, of a head whose first key lies at `first`.
  template <class T>
  SeenRows<T> seen(const Sequence& s, T* first, int64_t stride) const {
    return {first, stride, masked_ ? keys_.data() + s.batch * lk_ : nullptr};
  }

  // fn(key) for every key of a sequence that no query sees.
  template <class Fn>
  void unseen(const Sequence& s, Fn&& fn) const {
    const int64_t end = s.before + s.lq;
    const int64_t* counts = masked_ ? counts_.data() + s.batch * (lk_ + 1) : nullptr;
    for (int64_t j = masked_ ? 0 : end; j < s.lk; ++j)
      if (j >= end || counts[j] == counts[j + 1]) fn(j);
  }

  // Pairs of a query and a key, about.
  static int64_t pairs(const Sequence& s) { return s.lq * (s.before + (s.lq + 1) / 2); }

  int64_t operations(int64_t q_heads, int64_t head_dim) const {
    int64_t sum = 0;
    for (const Sequence& s : sequences_) sum += pairs(s);
    return 4 * sum * q_heads * head_dim;
  }

  int64_t longest() const {
    int64_t most = 1;
    for (const Sequence& s : sequences_) most = std::max(most, s.lq);
    return most;
  }

 private:
  // Each document that isn't empty is a sequence.
  void split(const Tensor& cu_seqlens, int64_t total) {
    const auto* at = ::data<const int64_t>(cu_seqlens);
    const int64_t stride = cu_seqlens.stride(0), count = cu_seqlens.size(0) - 1;
    if (at[0] != 0 || at[count * stride] != total)
      refuse("cu_seqlens must be rising from 0 to ", total, ", got ", at[0], " to ",
             at[count * stride]);
    sequences_.reserve(static_cast<size_t>(count));
    for (int64_t d = 0; d < count; ++d) {
      const int64_t begin = at[d * stride], end = at[(d + 1) * stride];
      if (begin > end)
        refuse("cu_seqlens must be rising from 0 to ", total, ", got ", begin, " before ", end);
      if (begin < end) sequences_.push_back({0, begin, end - begin, end - begin, 0});
    }
  }

  void move(const Tensor& offsets) {
    const auto* at = ::data<const int64_t>(offsets);
    for (Sequence& s : sequences_) {
      s.before = at[s.batch * offsets.stride(0)];
      if (s.before < 0 || s.before > s.lk - s.lq)
        refuse("offsets must be in [0, ", s.lk - s.lq + 1, ") (k's length less q's), got ",
               s.before);
    }
  }

  void mask(const Tensor& key_mask, int64_t batch) {
    const bool* mask = ::data<const bool>(key_mask);
    keys_.resize(static_cast<size_t>(batch * lk_));
    counts_.resize(static_cast<size_t>(batch * (lk_ + 1)));
    for (int64_t b = 0; b < batch; ++b) {
      int64_t count = 0;
      for (int64_t j = 0; j < lk_; ++j) {
        counts_[b * (lk_ + 1) + j] = count;
        if (mask[b * key_mask.stride(0) + j * key_mask.stride(1)]) keys_[b * lk_ + count++] = j;
      }
      counts_[b * (lk_ + 1) + lk_] = count;
    }
  }

  int64_t lk_;
  bool masked_;
  std::vector<Sequence> sequences_;
  // With a mask: the keys that are left of each row of the batch, and how many of the first n are.
  std::vector<int64_t> keys_, counts_;
};
