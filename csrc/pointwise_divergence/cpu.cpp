// Divergences of single elements, in one pass over memory each way.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/cpu/position_weight.h"
#include "pointwise_divergence/binding.h"
#include "pointwise_divergence/plan.h"

namespace kdkernels::cpu {
namespace {

PointwiseArguments arguments_of(const Tensor& input, const Tensor& target, const Tensor& temperature,
                                const Tensor& beta, const std::string& divergence) {
  PointwiseArguments arguments;
  arguments.is_double = is_double(input) || is_double(target);
  arguments.temperature = read_scalar(temperature);
  arguments.beta = read_scalar(beta);
  arguments.choose_formula(divergence);
  return arguments;
}

// Calls body(index, pointer to the number) for the numbers of a tensor of S in flattened order.
template <class S, class Body>
void for_each_number(const Tensor& tensor, const Body& body) {
  const S* const data = static_cast<const S*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    int64_t offset = 0;
    for (int64_t d = tensor.dim() - 1, index = i; d >= 0; --d) {
      offset += index % tensor.size(d) * tensor.stride(d);
      index /= tensor.size(d);
    }
    body(i, data[offset]);
  }
}

// The sum of the weights, each of which is checked. Those of an expanded tensor lie in memory once.
double checked_sum(const Tensor& weight) {
  int64_t distinct = 1;
  bool dense = true;
  for (int64_t d = weight.dim() - 1; d >= 0; --d) {
    if (weight.stride(d) == 0 || weight.size(d) == 1) continue;
    dense = dense && weight.stride(d) == distinct;
    distinct *= weight.size(d);
  }
  if (weight.numel() == 0) return 0;
  if (dense) {
    const ElementWeights weights{weight.const_data_ptr(), is_double(weight), distinct};
    const double total = sum_over_chunks(
        weights.chunks(), [&](int64_t begin, int64_t end) { return sum_of_element_weights(weights, begin, end); });
    if (std::isfinite(total)) return total * double(weight.numel() / distinct);
  }
  double total = 0;
  dispatch_compute_type(is_double(weight), [&](auto type) {
    using S = typename decltype(type)::type;
    for_each_number<S>(weight,
                       [&](int64_t i, S number) { total += checked_weight("position_weight", i, double(number)); });
  });
  return total;
}

// Throws if a probability of a binary divergence is not one; called where a loss is NaN.
void check_probabilities(const Tensor& target, const std::optional<Tensor>& weight) {
  const Tensor dense_target = torch::stable::contiguous(target);
  const auto dense_weight = dense(weight);
  with_storage(storage_of(target), [&](auto type) {
    using T = decltype(type);
    using S = Compute<T>;
    const T* const numbers = static_cast<const T*>(dense_target.const_data_ptr());
    for (int64_t i = 0; i < dense_target.numel(); ++i) {
      const double p = double(load_one<S>(numbers + i));
      if (p >= 0 && p <= 1) continue;
      if (std::isnan(p)) continue;
      if (dense_weight) {
        const bool of_double = is_double(*dense_weight);
        const void* const w = dense_weight->const_data_ptr();
        if (of_double ? static_cast<const double*>(w)[i] == 0 : static_cast<const float*>(w)[i] == 0) continue;
      }
      throw std::invalid_argument("target[" + std::to_string(i) + "] (in flattened order) is " + std::to_string(p) +
                                  "; expected a probability in [0, 1], or pass target_type='logits'");
    }
  });
}

double normalizer_of(const Tensor& input, const std::optional<Tensor>& weight, const std::string& reduction) {
  const double total = weight ? checked_sum(*weight) : double(input.numel());
  return reduction == "mean" ? math::inverse(total) : 1;
}

Tensor pointwise_divergence(Tensor input, Tensor target, std::optional<Tensor> weight, Tensor temperature, Tensor beta,
                            std::string divergence, std::string reduction) {
  const PointwiseArguments arguments = arguments_of(input, target, temperature, beta, divergence);
  const bool by_element = reduction == "none";
  const ScalarType dtype = compute_dtype(arguments.is_double);
  Tensor loss =
      by_element ? new_output(input, dtype) : torch::stable::new_empty(input, std::array<int64_t, 0>{}, dtype);
  PointwiseLayout layout;
  add_operand(layout, left, input);
  add_operand(layout, right, target);
  if (weight) add_operand(layout, element_weight, *weight);
  if (by_element) add_operand(layout, left_result, loss);
  layout.simplify();
  const double normalizer = normalizer_of(input, weight, reduction);
  const PointwiseCall call(layout, arguments);
  const double total =
      sum_over_chunks(call.chunks(), [&](int64_t begin, int64_t end) { return pointwise_losses(call, begin, end); });
  if (arguments.target_is_probability && std::isnan(total)) check_probabilities(target, weight);
  if (by_element) return loss;
  dispatch_compute_type(arguments.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    *static_cast<S*>(loss.mutable_data_ptr()) = S(total * normalizer);
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> pointwise_divergence_backward(Tensor grad_output, Tensor input, Tensor target,
                                                                 std::optional<Tensor> weight, Tensor temperature,
                                                                 Tensor beta, std::string divergence,
                                                                 std::string reduction, bool input_gradient,
                                                                 bool target_gradient, bool temperature_gradient) {
  const PointwiseArguments arguments = arguments_of(input, target, temperature, beta, divergence);
  const ScalarType dtype = compute_dtype(arguments.is_double);
  STD_TORCH_CHECK(grad_output.scalar_type() == dtype, "grad_output must have the dtype of the loss");
  Tensor grad_input = input_gradient ? new_output(input) : nothing(input);
  Tensor grad_target = target_gradient ? new_output(target) : nothing(target);
  PointwiseLayout layout;
  if (reduction != "none") add_number(layout, incoming_gradient, grad_output);
  if (reduction == "none") add_operand(layout, incoming_gradient, grad_output);
  if (weight) add_operand(layout, element_weight, *weight);
  if (input_gradient) add_operand(layout, left_result, grad_input);
  if (target_gradient) add_operand(layout, right_result, grad_target);
  add_operand(layout, left, input);
  add_operand(layout, right, target);
  layout.simplify();
  PointwiseCall call(layout, arguments);
  call.normalizer = normalizer_of(input, weight, reduction);
  call.sum_temperature = temperature_gradient;
  const double total =
      sum_over_chunks(call.chunks(), [&](int64_t begin, int64_t end) { return pointwise_gradients(call, begin, end); });
  if (!temperature_gradient) {
    return {grad_input, grad_target, torch::stable::new_empty(input, std::array<int64_t, 1>{0}, dtype)};
  }
  Tensor grad_temperature = torch::stable::new_empty(input, std::array<int64_t, 0>{}, dtype);
  dispatch_compute_type(arguments.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    *static_cast<S*>(grad_temperature.mutable_data_ptr()) = S(total);
  });
  return {grad_input, grad_target, grad_temperature};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("pointwise_divergence.native", TORCH_BOX(&kdkernels::cpu::pointwise_divergence));
  m.impl("pointwise_divergence_backward.native", TORCH_BOX(&kdkernels::cpu::pointwise_divergence_backward));
}
