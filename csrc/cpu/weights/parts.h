// A weight as the ops take one: its tensors, and a number that says what they are.
#pragma once

#include "shared/tensors.h"
#include "shared/weight_table.h"

inline Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Element::BFloat16;
    case ScalarType::Half: return Element::Half;
    default: return Element::Float;
  }
}

// A weight's tensors and its bits, as elmkernels' `parts` gives them to the ops that take one
// weight: `bits` is 0 for a plain tensor, 8 or 4 for an affine form, 12 for packed12. Rows of
// `data` may have any stride.
struct WeightParts {
  const Tensor& data;
  const Optional &scales, &biases, &exponents, &escape_starts, &escape_columns, &escape_values;
  int64_t bits;

  Weight weight(int64_t k) const {
    Weight w{};
    w.n = data.size(0);
    w.k = k;
    w.data = ::data<const uint8_t>(data);
    if (bits == 0) {
      w.form = static_cast<Form>(element_of(data));
      w.row_bytes = data.stride(0) * (w.form == Form::Float ? 4 : 2);
    } else if (bits == 12) {
      w.form = Form::Packed12;
      w.row_bytes = data.stride(0);
      w.exponents = ::data<const uint8_t>(*exponents);
      w.escape_starts = ::data<const int32_t>(*escape_starts);
      w.escape_columns = ::data<const int32_t>(*escape_columns);
      w.escape_values = ::data<const uint16_t>(*escape_values);
    } else {
      w.form = bits == 8 ? Form::Affine8 : Form::Affine4;
      w.row_bytes = data.stride(0) * 4;
      w.element = element_of(*scales);
      w.scales = ::data<const uint8_t>(*scales);
      w.biases = ::data<const uint8_t>(*biases);
      w.group = k / scales->size(1);
    }
    return w;
  }
};
