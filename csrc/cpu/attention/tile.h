// A tile of queries that share one key/value head: where its rows and its keys lie, and which keys
// each row sees.
#pragma once

#include <limits>

#include "cpu/attention/product.h"
#include "shared/ranges.h"

// Keys that are gathered at once. A block's keys and values are 16 KB each for bf16 at head_dim 64.
// Half as many were slower: each block ends with a maximum and a sum across its lanes.
constexpr int64_t kKeyBlock = 128;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896340736f;

// Rows whose scores are in scratch at once. Of AMX two tiles: half as many would load each tile of
// keys and values twice as often.
template <class T>
constexpr int64_t kStepRows = Operand<T>::tiled ? 2 * kAmxRows : kTileRows;

// What belongs to the rows of a tile: `group` neighbouring heads of one token after the other. The
// strides lead from a token and from a head to the next.
template <class T>
struct TileRows {
  T* first;
  int64_t group, token_stride, head_stride;

  T* operator()(int64_t r) const {
    return first + r / group * token_stride + r % group * head_stride;
  }
};

// The keys or the values of one head that are seen at all. Without an index they all are.
template <class T>
struct SeenRows {
  T* first;
  int64_t stride;
  const int64_t* index;

  T* operator()(int64_t j) const { return first + (index == nullptr ? j : index[j]) * stride; }
  // Those from the j-th on.
  SeenRows from(int64_t j) const {
    if (index == nullptr) return {first + j * stride, stride, nullptr};
    return {first, stride, index + j};
  }
};

// A row sees the first keys: those before its token, and its token's own. With a mask `counts`
// tells how many of the first n keys are seen.
struct KeyLimit {
  int64_t before, group;
  const int64_t* counts;

  int64_t operator()(int64_t r) const {
    const int64_t end = before + r / group + 1;
    return counts == nullptr ? end : counts[end];
  }
};

template <class T>
struct Tile {
  TileRows<const T> q;
  int64_t rows;
  SeenRows<const T> k, v;
  KeyLimit limit;  // never falls from row to row
  int64_t head_dim;
  float scale;
  bool whole;  // the tile has all rows of its head
};
