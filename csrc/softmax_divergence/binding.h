// From torch's tensors to the arguments of a call: what the bindings of both devices share.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "softmax_divergence/arguments.h"

namespace kdkernels {

// The arguments that the forward and the backward have in common, as torch passes them
struct SoftmaxTensors {
  const Tensor &input, &target;
  const std::optional<Tensor>& labels;
  const Tensor &temperature, &divergence_weight, &label_weight, &beta;
  int64_t dim;
  const std::string &divergence, &reduction;
  int64_t ignore_index;
  bool other_losses = false;  // whether the op has them
};

// A call in preparation: its shape comes from the student's logits; gradients are added afterwards.
template <class Number>
class SoftmaxPreparation {
 public:
  SoftmaxArguments<Number> arguments;

  // read_number(tensor) reads a 0-dim tensor.
  template <class ReadNumber>
  SoftmaxPreparation(const SoftmaxTensors& given, const ReadNumber& read_number) : dim_(given.dim) {
    layout_.classes = given.input.size(dim_);
    for (int64_t d = 0; d < given.input.dim(); ++d) {
      if (d == dim_) continue;
      layout_.positions *= given.input.size(d);
      layout_.outer_size[layout_.outer_dims++] = given.input.size(d);
    }
    add(student, given.input);
    add(teacher, given.target);
    arguments.is_double = is_double(given.input) || is_double(given.target);
    arguments.temperature = read_number(given.temperature);
    arguments.beta = read_number(given.beta);
    arguments.divergence_weight = read_number(given.divergence_weight);
    arguments.label_weight = read_number(given.label_weight);
    // The kernels give NaN where a number that only the device knows is wrong.
    check_temperature(known_value(arguments.temperature, 1));
    const double beta = known_value(arguments.beta, 0.5);
    if (!given.other_losses || !arguments.choose_other(given.divergence, beta)) {
      arguments.choose_divergence(given.divergence, beta);
    }
    labels_ = dense(given.labels);
    if (labels_) arguments.labels = labels_->const_data_ptr<int64_t>();
    arguments.ignored_label = given.ignore_index;
    arguments.choose_divisor(given.reduction, given.input.size(0), positions());
  }

  void add(OperandIndex index, const Tensor& tensor) {
    SoftmaxOperand<max_dims>& operand = layout_.operand[index];
    operand.data = const_cast<void*>(tensor.const_data_ptr());
    operand.storage = storage_of(tensor);
    operand.class_stride = tensor.stride(dim_);
    for (int64_t d = 0, kept = 0; d < tensor.dim(); ++d) {
      if (d != dim_) operand.outer_stride[kept++] = tensor.stride(d);
    }
  }

  int64_t positions() const { return layout_.positions; }
  ScalarType dtype() const { return compute_dtype(arguments.is_double); }

  SoftmaxLayout<max_dims> layout() const {
    SoftmaxLayout<max_dims> result = layout_;
    result.join();
    return result;
  }

  // The uninitialized loss: a number, or one per position
  Tensor new_loss(const SoftmaxTensors& given) const {
    std::vector<int64_t> shape;
    if (given.reduction == "none") shape = positions_of(given.input);
    return torch::stable::new_empty(given.input, shape, dtype());
  }

  // In place of a result that was not asked for
  Tensor nothing_computed(const Tensor& like) const {
    return torch::stable::new_empty(like, std::array<int64_t, 1>{0}, dtype());
  }

  // The shape of a row for each part of the loss
  std::vector<int64_t> parts_shape(const Tensor& input) const {
    std::vector<int64_t> shape = positions_of(input);
    shape.insert(shape.begin(), 6);
    return shape;
  }

  // `grad_output` must outlive the call.
  void set_grad_output(const Tensor& grad_output, const std::string& reduction) {
    arguments.grad_output = grad_output.const_data_ptr();
    arguments.grad_stride = reduction == "none" ? 1 : 0;
  }
  void check_grad_output(const Tensor& grad_output) const {
    STD_TORCH_CHECK(grad_output.scalar_type() == dtype(), "grad_output must have the dtype of the loss");
  }

 private:
  std::vector<int64_t> positions_of(const Tensor& input) const {
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < input.dim(); ++d) {
      if (d != dim_) shape.push_back(input.size(d));
    }
    return shape;
  }

  int64_t dim_;
  SoftmaxLayout<max_dims> layout_;
  std::optional<Tensor> labels_;
};

}  // namespace kdkernels
