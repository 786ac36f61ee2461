// From torch's tensors to the arguments of a call: what the bindings share.
#pragma once

#include <optional>

#include "core/dispatch.h"
#include "pointwise_divergence/arguments.h"

namespace kdkernels {

// Adds a tensor of the shape of the input to a layout.
inline void add_operand(PointwiseLayout& layout, PointwiseOperandIndex index, const Tensor& tensor) {
  PointwiseOperand& operand = layout.operand[index];
  operand.data = const_cast<void*>(tensor.const_data_ptr());
  operand.storage = storage_of(tensor);
  layout.dims = int(tensor.dim());
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = tensor.size(d);
    operand.stride[d] = tensor.stride(d);
  }
}

// Adds a number that every element takes part with.
inline void add_number(PointwiseLayout& layout, PointwiseOperandIndex index, const Tensor& number) {
  layout.operand[index] = {const_cast<void*>(number.const_data_ptr()), storage_of(number), {}};
}

}  // namespace kdkernels
