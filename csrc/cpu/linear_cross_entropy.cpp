// linear_cross_entropy: a chunk of logits becomes losses and, in place, its own gradient. A row is
// read from memory once, for a maximum and a sum that follow each other block by block, and from L2
// a second time. Two exponentials an element are little beside the three products of the op.
// Shares of dweight, which those products make in a half type, are added in float32.
#include <cmath>
#include <limits>

#include "cpu/op.h"
#include "cpu/simd/exponentials.h"

namespace {

constexpr int64_t kBlock = 2048;  // elements whose maximum is known before they are summed: in L1
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = std::numeric_limits<float>::lowest();  // -inf from it is no NaN

struct Options {
  int64_t ignore_index;
  float z_loss, smoothing;
};

// max = the largest x, sum = sum e^(x - max), offsets = sum (x - max): nothing is lost if all
// logits share an offset, however large.
struct Softmax {
  float max, sum, offsets;
};

template <class T>
float value_of(const T* x) {
  return sum(load(x, Tail{1}));
}

template <class T>
float largest_of(const T* x, int64_t whole, int64_t count) {
  Vec tops[4];
  for (Vec& top : tops) top = vec(kLowest);
  sweep(whole, [&](int64_t i, auto) {
    Vec& top = tops[i / Vec::size % 4];
    top = max(load(x + i, Full{}), top);
  });
  float found = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  for (int64_t i = whole; i < count; ++i) found = std::max(found, value_of(x + i));
  return found;
}

template <class T>
Softmax softmax_of(const T* row, int64_t n) {
  Softmax found{kLowest, 0.0f, 0.0f};
  for (int64_t first = 0; first < n; first += kBlock) {
    const T* x = row + first;
    const int64_t count = std::min(kBlock, n - first), whole = count / Vec::size * Vec::size;
    const float top = largest_of(x, whole, count);
    if (top > found.max) {
      if (first > 0) {
        found.sum *= std::exp(found.max - top);
        found.offsets -= static_cast<float>(first) * (top - found.max);
      }
      found.max = top;
    }
    const Vec zero = vec(found.max);
    float sums[2];
    sweep_sums(whole, sums, [&](int64_t i, auto, Vec* acc) {
      const Vec offset = load(x + i, Full{}) - zero;
      acc[0] = acc[0] + exp2_of(offset * vec(kLog2E), float{});
      acc[1] = acc[1] + offset;
    });
    for (int64_t i = whole; i < count; ++i) {  // a tail's missing elements are no zeros here
      const float offset = value_of(x + i) - found.max;
      sums[0] += std::exp(offset);
      sums[1] += offset;
    }
    found.sum += sums[0];
    found.offsets += sums[1];
  }
  return found;
}

// The loss of one row; with `grad`, dloss times its gradient takes the row's place:
//   dx_j = dloss ((1 + 2 z lse) p_j - smoothing / n - (1 - smoothing) [j = target]).
template <class T>
float row_loss(T* x, int64_t n, int64_t target, float dloss, const Options& o, bool grad) {
  if (target == o.ignore_index || target < 0 || target >= n) {
    const float value = target == o.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (grad) sweep(n, [&](int64_t i, auto part) { store(x + i, vec(value), part); });
    return value;
  }
  const Softmax row = softmax_of(x, n);
  const float at = value_of(x + target) - row.max;
  const float log_sum = std::log(row.sum);
  const float lse = row.max + log_sum;
  const float hit = 1.0f - o.smoothing, each = o.smoothing / static_cast<float>(n);
  if (grad) {
    const float slope = dloss * (1.0f + 2.0f * o.z_loss * lse) / row.sum;
    const Vec zero = vec(row.max), less = vec(dloss * each), factor = vec(slope);
    sweep(n, [&](int64_t i, auto part) {
      const Vec power = exp2_of((load(x + i, part) - zero) * vec(kLog2E), float{});
      store(x + i, power * factor - less, part);
    });
    store(x + target, vec(slope * std::exp(at) - dloss * (each + hit)), Tail{1});
  }
  // Without smoothing an offset of -inf (a masked logit) is nobody's.
  const float smooth = each > 0.0f ? each * row.offsets : 0.0f;
  return log_sum - hit * at - smooth + o.z_loss * lse * lse;
}

Tensor linear_cross_entropy_rows(Tensor logits, const Tensor& targets, Optional dloss,
                                 int64_t ignore_index, double z_loss, double smoothing, bool grad) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  Tensor losses = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const Options options{ignore_index, static_cast<float>(z_loss), static_cast<float>(smoothing)};
  with_dtype(logits, [&](auto t) {
    using T = decltype(t);
    const int64_t stride = logits.stride(0);
    const auto* target = data<const int64_t>(targets);
    const auto* arriving = dloss ? data<const float>(*dloss) : nullptr;
    parallel_rows(rows, n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        data<float>(losses)[r] = row_loss(data<T>(logits) + r * stride, n, target[r],
                                          arriving ? arriving[r] : 1.0f, options, grad);
    });
  });
  return losses;
}

// total = total + scale share, or scale share alone if `fresh`, rounded once. It is one pass over
// both; torch would first write the share anew in total's dtype. The rows of both may lie apart.
void linear_cross_entropy_add(const Tensor& total, const Tensor& share, Optional scale,
                              bool fresh) {
  const int64_t rows = total.size(0), n = total.size(1);
  const Vec factor = vec(scale ? *data<const float>(*scale) : 1.0f);
  with_dtype(total, [&](auto t) {
    with_dtype(share, [&](auto s) {
      auto* to = data<decltype(t)>(total);
      const auto* from = data<const decltype(s)>(share);
      const int64_t apart = total.stride(0), each = share.stride(0);
      parallel_rows(rows, n, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          auto* sum = to + r * apart;
          const auto* x = from + r * each;
          if (fresh) {
            sweep(n,
                  [&](int64_t i, auto part) { store(sum + i, load(x + i, part) * factor, part); });
          } else {
            sweep(n, [&](int64_t i, auto part) {
              store(sum + i, load(sum + i, part) + load(x + i, part) * factor, part);
            });
          }
        }
      });
    });
  });
}

}  // namespace

ELMKERNELS_IMPL(m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&linear_cross_entropy_rows));
  m.impl("linear_cross_entropy_add", TORCH_BOX(&linear_cross_entropy_add));
}
