// A weight matrix [n, k] in any of its forms, and the table of a decoder's weights: rows of int64
// that elmkernels/weights/table.py writes. tests/cuda/test_weight_table.py holds both sides to
// the same numbers and the same order.
#pragma once

#include <cstdint>

#include "shared/host_device.h"

// The last two are affine forms that meet activations of 8 bits, each 32 columns of which share a
// scale (elmkernels/reference/linear.py: int8_rows).
enum class Form : int64_t {
  Float,
  BFloat16,
  Half,
  Affine8,
  Affine4,
  Packed12,
  Affine8Int8,
  Affine4Int8
};
enum class Element : int64_t { Float, BFloat16, Half };

// A row of a packed12 weight is a sequence of segments: 128 bytes of signs and mantissas, then 64
// bytes of 4-bit codes. The code kEscape marks a weight whose exponent is not in the table.
constexpr int64_t kSegmentColumns = 128, kSegmentBytes = 192;
constexpr uint32_t kEscape = 15;

// Fields that a form doesn't use are zero.
struct Weight {
  Form form;
  int64_t n, k, row_bytes;
  const uint8_t* data;
  // Affine: w = scales q + biases, one of both per `group` columns.
  Element element;  // of scales and biases
  const uint8_t *scales, *biases;
  int64_t group;
  // Packed12: the exponent of each code; the escapes of row r are [starts[r], starts[r + 1]).
  const uint8_t* exponents;
  const int32_t *escape_starts, *escape_columns;
  const uint16_t* escape_values;

  HOST_DEVICE const uint8_t* row(int64_t r) const { return data + r * row_bytes; }
  HOST_DEVICE int64_t groups() const { return k / group; }
  HOST_DEVICE bool meets_int8() const {
    return form == Form::Affine8Int8 || form == Form::Affine4Int8;
  }
  HOST_DEVICE bool affine() const {
    return form == Form::Affine8 || form == Form::Affine4 || meets_int8();
  }
};

// A weight's fields in the table.
constexpr int kWeightFields = 13;

HOST_DEVICE Weight weight_from(const int64_t* fields) {
  Weight w;
  w.form = static_cast<Form>(fields[0]);
  w.n = fields[1];
  w.k = fields[2];
  w.row_bytes = fields[3];
  w.data = reinterpret_cast<const uint8_t*>(fields[4]);
  w.element = static_cast<Element>(fields[5]);
  w.scales = reinterpret_cast<const uint8_t*>(fields[6]);
  w.biases = reinterpret_cast<const uint8_t*>(fields[7]);
  w.group = fields[8];
  w.exponents = reinterpret_cast<const uint8_t*>(fields[9]);
  w.escape_starts = reinterpret_cast<const int32_t*>(fields[10]);
  w.escape_columns = reinterpret_cast<const int32_t*>(fields[11]);
  w.escape_values = reinterpret_cast<const uint16_t*>(fields[12]);
  return w;
}

// Where the parts of a layer begin in its row: four weights, the addresses of four norms, counts.
enum LayerField : int {
  kQkvProj = 0,
  kOutProj = kWeightFields,
  kProj1 = 2 * kWeightFields,
  kProj2 = 3 * kWeightFields,
  kAttnNorm = 4 * kWeightFields,
  kQNorm,
  kKNorm,
  kFfnNorm,
  kQHeads,
  kKvHeads,
  kLayerFields
};

// The row behind the layers' has the embedding, the head and the last norm.
enum LastField : int { kEmbedding = 0, kHead = kWeightFields, kLastNorm = 4 * kWeightFields };
