// What csrc/shared/weight_table.h makes of a table that Python wrote.
#include "shared/weight_table.h"

extern "C" {

// Of a weight's fields, in the order of FIELDS in test_weight_table.py.
void read_weight(const int64_t* fields, int64_t* out) {
  const Weight w = weight_from(fields);
  const auto address = [](const void* p) { return reinterpret_cast<int64_t>(p); };
  const int64_t found[] = {w.n,
                           w.k,
                           w.row_bytes,
                           w.group,
                           address(w.data),
                           address(w.scales),
                           address(w.biases),
                           address(w.exponents),
                           address(w.escape_starts),
                           address(w.escape_columns),
                           address(w.escape_values)};
  for (int64_t x : found) *out++ = x;
}

const char* form_of(const int64_t* fields) {
  switch (weight_from(fields).form) {
    case Form::Float: return "float32";
    case Form::BFloat16: return "bfloat16";
    case Form::Half: return "float16";
    case Form::Affine8: return "affine8";
    case Form::Affine4: return "affine4";
    case Form::Packed12: return "packed12";
    case Form::Affine8Int8: return "affine8 by int8";
    case Form::Affine4Int8: return "affine4 by int8";
  }
  return "none";
}

const char* element_of(const int64_t* fields) {
  switch (weight_from(fields).element) {
    case Element::Float: return "float32";
    case Element::BFloat16: return "bfloat16";
    case Element::Half: return "float16";
  }
  return "none";
}

// Where a part of a layer's row begins; that of the last row's.
int64_t layer_field(int64_t i) {
  const int64_t found[] = {kQkvProj, kOutProj, kProj1,   kProj2,  kAttnNorm,
                           kQNorm,   kKNorm,   kFfnNorm, kQHeads, kKvHeads};
  return found[i];
}
int64_t last_field(int64_t i) {
  const int64_t found[] = {kEmbedding, kHead, kLastNorm};
  return found[i];
}

int64_t constant(int64_t i) {
  const int64_t found[] = {kWeightFields, kLayerFields, kSegmentColumns, kSegmentBytes, kEscape};
  return found[i];
}
}
