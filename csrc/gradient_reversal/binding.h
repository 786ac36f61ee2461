// From torch's tensors to the arguments of a call: what the bindings of both devices share.
#pragma once

#include "core/dispatch.h"
#include "gradient_reversal/arguments.h"

namespace kdkernels {

// `source` and `result` have the same strides.
inline ScaleArguments arguments_of(const Tensor& source, const Tensor& result) {
  return {storage_of(source), source.const_data_ptr(), const_cast<void*>(result.const_data_ptr()), source.numel()};
}

}  // namespace kdkernels
