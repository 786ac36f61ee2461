// The divergence from a teacher's top classes and its backward.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/cpu/position_weight.h"
#include "topk_divergence/binding.h"
#include "topk_divergence/plan.h"

namespace kdkernels::cpu {
namespace {

// Throws what is wrong with a position that a kernel refused.
template <class S>
[[noreturn]] void refuse(const TopKArguments& call, int64_t position) {
  std::vector<int64_t> seen;
  double mass = 0;
  for (int64_t k = position * call.listed; k < (position + 1) * call.listed; ++k) {
    const double value = double(static_cast<const S*>(call.values)[k]);
    if (value == -std::numeric_limits<double>::infinity()) continue;
    const int64_t index = call.indices[k];
    const std::string name = "indices[" + std::to_string(k) + "] (in flattened order) is " + std::to_string(index);
    if (index < 0 || index >= call.classes) {
      throw std::out_of_range(name + "; expected a class from 0 to " + std::to_string(call.classes - 1) +
                              ", or a value of -inf there, which marks padding");
    }
    if (std::find(seen.begin(), seen.end(), index) != seen.end()) {
      throw std::invalid_argument(name +
                                  ", which the same position lists already; expected different classes, or a "
                                  "value of -inf there, which marks padding");
    }
    seen.push_back(index);
    mass += std::exp(value);
  }
  throw std::invalid_argument("the probabilities that values stand for add up to " + std::to_string(mass) +
                              " at position " + std::to_string(position) +
                              " (in flattened order); expected at most 1: pass values_type=\"logits\" with "
                              "target_logsumexp if they are logits, else check target_logsumexp and temperature");
}

// The sum of the losses is divided by it; infinity where the sum is empty
template <class S>
double divisor(const TopKArguments& call, const std::string& reduction, int64_t batch) {
  double total = double(call.positions);
  if (call.weights != nullptr) {
    total = sum_of_weights("position_weight", static_cast<const S*>(call.weights), call.positions);
  }
  return reduction == "mean" ? total : reduction == "batchmean" ? double(batch) : 1;
}

double run_forward(const TopKCall& call) {
  const Chunks chunks = call.chunks();
  std::vector<double> partial(size_t(chunks.count()));
  std::vector<int64_t> refused(size_t(chunks.count()), -1);
  for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    partial[size_t(chunk)] = topk_forward(call, begin, end, &refused[size_t(chunk)]);
  });
  for (const int64_t position : refused) {
    if (position < 0) continue;
    dispatch_compute_type(call.is_double, [&](auto type) { refuse<typename decltype(type)::type>(call, position); });
  }
  double total = 0;
  for (const double sum : partial) total += sum;
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_divergence(Tensor input, Tensor values, Tensor indices,
                                                           std::optional<Tensor> position_weight, Tensor temperature,
                                                           std::string tail, bool reverse, std::string reduction,
                                                           bool masses) {
  const TopKTensors tensors(input, values, indices, position_weight, read_scalar(temperature), tail, reverse);
  TopKCall call(tensors.arguments);
  call.want_masses = masses;
  const std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end() - 1);
  const bool by_position = reduction == "none";
  Tensor loss = torch::stable::new_empty(values, by_position ? shape : std::vector<int64_t>(), tensors.dtype());
  const auto by_positions = [&] {
    return masses ? torch::stable::new_empty(values, shape, tensors.dtype()) : nothing(values);
  };
  Tensor target_mass = by_positions(), input_mass = by_positions();
  Tensor rest = torch::stable::new_empty(values, std::array<int64_t, 2>{2, call.positions}, tensors.dtype());
  if (masses) {
    call.target_mass = target_mass.mutable_data_ptr();
    call.input_mass = input_mass.mutable_data_ptr();
  }
  call.rest = rest.mutable_data_ptr();
  if (by_position) call.losses = loss.mutable_data_ptr();
  dispatch_compute_type(call.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    const double divided_by = divisor<S>(call, reduction, input.size(0));
    const double total = run_forward(call);
    if (!by_position) *static_cast<S*>(loss.mutable_data_ptr()) = S(total * math::inverse(divided_by));
  });
  return {loss, target_mass, input_mass, rest};
}

std::tuple<Tensor, Tensor> topk_divergence_backward(Tensor grad_output, Tensor rest, Tensor input, Tensor values,
                                                    Tensor indices, std::optional<Tensor> position_weight,
                                                    Tensor temperature, std::string tail, bool reverse,
                                                    std::string reduction, bool input_gradient, bool values_gradient) {
  const TopKTensors tensors(input, values, indices, position_weight, read_scalar(temperature), tail, reverse);
  STD_TORCH_CHECK(grad_output.scalar_type() == tensors.dtype(), "grad_output must have the dtype of the loss");
  TopKCall call(tensors.arguments);
  Tensor grad_input = input_gradient ? new_output(input) : nothing(input);
  const std::vector<int64_t> shape(values.sizes().begin(), values.sizes().end());
  Tensor grad_values = values_gradient ? torch::stable::new_empty(values, shape) : nothing(values);
  if (input_gradient) call.grad_input = TopKTensors::rows(grad_input);
  if (values_gradient) call.grad_values = grad_values.mutable_data_ptr();
  const Tensor grad = torch::stable::contiguous(grad_output), sums = torch::stable::contiguous(rest);
  call.grad_output = grad.const_data_ptr();
  call.grad_stride = reduction == "none" ? 1 : 0;
  call.rest = const_cast<void*>(sums.const_data_ptr());
  dispatch_compute_type(call.is_double, [&](auto type) {
    call.normalizer = math::inverse(divisor<typename decltype(type)::type>(call, reduction, input.size(0)));
  });
  run_kernel(topk_backward, call);
  return {grad_input, grad_values};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("topk_divergence.native", TORCH_BOX(&kdkernels::cpu::topk_divergence));
  m.impl("topk_divergence_backward.native", TORCH_BOX(&kdkernels::cpu::topk_divergence_backward));
}
