// From torch's tensors to the arguments of a call: what the bindings of both devices share.
#pragma once

#include <optional>
#include <string>

#include "core/dispatch.h"
#include "topk_divergence/arguments.h"

namespace kdkernels {

// The arguments that the forward and the backward have in common, and dense copies that live as long as this
class TopKTensors {
 public:
  TopKArguments arguments;

  TopKTensors(const Tensor& input, const Tensor& values, const Tensor& indices, const std::optional<Tensor>& weight,
              double temperature, const std::string& tail, bool reverse)
      : values_(torch::stable::contiguous(values)),
        indices_(torch::stable::contiguous(indices)),
        weight_(dense(weight)) {
    const int64_t last = input.dim() - 1;
    arguments.is_double = is_double(values);
    STD_TORCH_CHECK(arguments.is_double || !is_double(input), "values must have the dtype that is computed in");
    STD_TORCH_CHECK(!weight || weight->scalar_type() == dtype(), "position_weight must have the dtype of values");
    arguments.classes = input.size(last);
    arguments.listed = values.size(last);
    arguments.outer_dims = int(last);
    for (int64_t d = 0; d < last; ++d) {
      arguments.outer_size[d] = input.size(d);
      arguments.positions *= input.size(d);
    }
    arguments.input = rows(input);
    arguments.values = values_.const_data_ptr();
    arguments.indices = indices_.const_data_ptr<int64_t>();
    arguments.weights = data_of(weight_);
    check_temperature_of_topk(temperature);
    arguments.temperature = temperature;
    arguments.tail = topk_tail_of(tail);
    arguments.reverse = reverse;
  }

  static TopKRows rows(const Tensor& tensor) {
    TopKRows result;
    result.data = const_cast<void*>(tensor.const_data_ptr());
    result.storage = storage_of(tensor);
    result.class_stride = tensor.stride(tensor.dim() - 1);
    for (int64_t d = 0; d + 1 < tensor.dim(); ++d) result.outer_stride[d] = tensor.stride(d);
    return result;
  }

  ScalarType dtype() const { return compute_dtype(arguments.is_double); }

 private:
  Tensor values_, indices_;
  std::optional<Tensor> weight_;
};

}  // namespace kdkernels
