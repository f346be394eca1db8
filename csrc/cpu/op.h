// What the CPU ops share: outputs, torch's threads, sums over rows in a fixed order.
#pragma once

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/simd/vec.h"
#include "shared/tensors.h"

// Work below this many elements isn't worth waking a second thread for.
constexpr int64_t kGrain = 32768;

// A contiguous tensor of other sizes in x's dtype.
[[gnu::noinline]] inline Tensor output(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, {sizes.data(), sizes.size()});
}
[[gnu::noinline]] inline Tensor output_like(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes());
}

// body(begin, end) over rows, on torch's own thread pool. Outputs are stored through the caches:
// streaming stores were mostly slower, the more so if the allocator hands out fresh pages.
template <class Body>
inline void parallel_rows(int64_t rows, int64_t elements_per_row, Body&& body) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
  if (rows <= grain) return body(int64_t{0}, rows);
  torch::stable::parallel_for(0, rows, grain, body);
}

// body(next) on every thread: next() hands out the items in turn, then -1. It is for items of
// unlike cost, the dearest first. Fewer than `worth` operations stay on this thread.
template <class Body>
inline void parallel_queue(int64_t items, int64_t operations, int64_t worth, Body&& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < items ? item : -1;
  };
  const int64_t threads =
      operations < worth ? 1 : std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads <= 1) return body(next);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) body(next);
  });
}

// A sum over rows, in an order that depends on nothing but the shape: blocks of rows into float
// partials (body(begin, end, partial)), then the partials in turn. At most 256 of them.
class RowSum {
 public:
  RowSum(int64_t rows, int64_t n)
      : rows_(rows),
        n_(n),
        block_(std::max<int64_t>(64, (rows + 255) / 256)),
        blocks_((rows + block_ - 1) / block_),
        partials_(static_cast<size_t>(blocks_ * n), 0.0f) {}

  template <class Body>
  void run(int64_t elements_per_row, Body&& body) {
    parallel_rows(blocks_, elements_per_row * block_, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        body(b * block_, std::min(rows_, (b + 1) * block_), partials_.data() + b * n_);
    });
  }

  // Writes columns [first, first + count) of the total.
  template <class W>
  void write(W* out, int64_t first, int64_t count) const {
    sweep(count, [&](int64_t i, auto part) {
      Vec total = vec(0.0f);
      for (int64_t b = 0; b < blocks_; ++b)
        total = total + load(partials_.data() + b * n_ + first + i, part);
      store(out + i, total, part);
    });
  }

 private:
  int64_t rows_, n_, block_, blocks_;
  std::vector<float> partials_;
};
