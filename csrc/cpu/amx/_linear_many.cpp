// linear of many rows by tiles: each byte of the weight is read once, and made dense in the cache.
// bfloat16 alone.
//
// 32 rows of the weight at a time are a panel in the layout of the second operand (1280 columns:
// 80 KB of L2); all rows of x pass it, 32 at a time. 2 n k operations a row of x, at 1,024 a cycle;
// 64 bytes of tiles from L2 for each of these cycles bind first. Counted, not measured.
#include "cpu/op.h"
#include "cpu/simd/amx_product.h"
#include "cpu/weights/dense.h"
#include "cpu/weights/parts.h"

namespace {

constexpr int64_t kPanel = 2 * kAmxLanes, kStep = 2 * kAmxRows;

// x as rows of whole tiles, [rows up to a whole step, depth].
class Gathered {
 public:
  Gathered(const Rows& x, int64_t k)
      : depth(lanes_of<bf16>(k)), lanes_(floats(round_up(x.count, kStep) * depth)) {
    parallel_rows(x.count, k, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        gather_rows<bf16>([&](int64_t) { return x.at<bf16>(r); }, 1, k, row(r).data, depth);
    });
  }

  Matrix<Bf16Pair> row(int64_t r) const {
    return {reinterpret_cast<Bf16Pair*>(lanes_.get()) + r * depth, depth};
  }

  const int64_t depth;

 private:
  const std::unique_ptr<float[], Free> lanes_;
};

// Room for a panel: its rows, dense, then as an operand; the sums of a step.
struct Panel {
  int64_t depth;
  std::unique_ptr<float[], Free> memory;
  Matrix<Bf16Pair> operand;
  Matrix<float> sums;
  bf16* rows;

  explicit Panel(int64_t depth) : depth(depth), memory(floats(kPanel * (2 * depth + kStep))) {
    Parts parts{memory.get()};
    operand = {parts.take_as<Bf16Pair>(kPanel * depth), kPanel};
    sums = {parts.take(kPanel * kStep), kPanel};
    rows = reinterpret_cast<bf16*>(parts.take(kPanel * depth));
  }

  void fill(const Weight& w, int64_t first, int64_t count) const {
    const auto row = [&](int64_t i) { return rows + i * 2 * depth; };
    for (int64_t i = 0; i < count; ++i) dense_row(w, first + i, row(i));
    gather_columns<bf16>(row, count, w.k, operand.data, kPanel);
  }
};

Tensor linear_many(const Tensor& x, const Tensor& data, Optional scales, Optional biases,
                   Optional exponents, Optional starts, Optional columns, Optional values,
                   int64_t bits) {
  const Rows in(x);
  const int64_t k = width_of(x);
  const Weight w =
      WeightParts{data, scales, biases, exponents, starts, columns, values, bits}.weight(k);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = w.n;
  Tensor y = output(x, sizes);
  bf16* out = ::data<bf16>(y);
  const Gathered gathered(in, k);
  parallel_rows((w.n + kPanel - 1) / kPanel, kPanel * k, [&](int64_t begin, int64_t end) {
    const Amx amx;
    const Panel panel(gathered.depth);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPanel, count = std::min(kPanel, w.n - first);
      panel.fill(w, first, count);
      for (int64_t r = 0; r < in.count; r += kStep) {
        const int64_t rows = std::min(kStep, in.count - r);
        product(gathered.row(r), panel.operand, panel.sums, rows, kPanel, gathered.depth, false);
        for (int64_t i = 0; i < rows; ++i)
          sweep(count, [&](int64_t n, auto part) {
            store(out + (r + i) * w.n + first + n, load(panel.sums.row(i) + n, part), part);
          });
      }
    }
  });
  return y;
}

}  // namespace

ELMKERNELS_IMPL(m) { m.impl("linear_many", TORCH_BOX(&linear_many)); }
