// Divergences between softmax distributions, with the cross-entropy of hard labels, in one pass over memory.
#include <optional>
#include <string>
#include <tuple>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "softmax_divergence/binding.h"
#include "softmax_divergence/plan.h"

namespace kdkernels::cpu {
namespace {

using Preparation = SoftmaxPreparation<double>;

// The number of labels that count. All are read before anything else, because each must be a class.
int64_t count_kept(const SoftmaxArguments<double>& call, int64_t positions, int64_t classes) {
  int64_t kept = 0;
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t label = call.labels[i];
    if (label == call.ignored_label) continue;
    if (label < 0 || label >= classes) {
      throw std::out_of_range("labels[" + std::to_string(i) + "] (in flattened order) is " + std::to_string(label) +
                              "; expected a class from 0 to " + std::to_string(classes - 1) + " or ignore_index " +
                              std::to_string(call.ignored_label));
    }
    ++kept;
  }
  return kept;
}

SoftmaxCall call_of(const Preparation& preparation) {
  SoftmaxCall call(preparation.layout(), preparation.arguments);
  const int64_t kept = call.labels == nullptr ? 0 : count_kept(call, call.positions, call.classes);
  call.normalizer = math::inverse(call.divide_by_kept ? double(kept) : call.divisor);
  return call;
}

double run(const SoftmaxCall& call) {
  return sum_over_chunks(call.chunks(), [&](int64_t begin, int64_t end) { return softmax_tiles(call, begin, end); });
}

std::tuple<Tensor, Tensor> softmax_divergence(Tensor input, Tensor target, std::optional<Tensor> labels,
                                              Tensor temperature, Tensor divergence_weight, Tensor label_weight,
                                              Tensor beta, int64_t dim, std::string divergence, std::string reduction,
                                              int64_t ignore_index, std::string save) {
  STD_TORCH_CHECK(save != "statistics", "the CPU kernels save a gradient or nothing");
  const SoftmaxTensors given{input, target, labels,     temperature, divergence_weight, label_weight,
                             beta,  dim,    divergence, reduction,   ignore_index};
  Preparation preparation(given, read_scalar);
  Tensor loss = preparation.new_loss(given);
  Tensor gradient = save == "gradient" ? new_output(input) : nothing(loss);
  if (save == "gradient") preparation.add(student_gradient, gradient);
  SoftmaxCall call = call_of(preparation);
  void* const loss_data = loss.mutable_data_ptr();
  if (reduction == "none") call.position_loss = loss_data;
  const double total = run(call) * call.normalizer;
  if (reduction == "none") return {loss, gradient};
  dispatch_compute_type(call.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    *static_cast<S*>(loss_data) = S(total);
  });
  return {loss, gradient};
}

// Adds up the derivatives of the loss by the temperature and by the weight of the divergence.
template <class S>
void sum_scalar_gradients(const SoftmaxCall& call, S* result) {
  const S* const by_temperature = static_cast<const S*>(call.scalar_gradients);
  const S* const grad_output = static_cast<const S*>(call.grad_output);
  double temperature = 0, weight = 0;
  for (int64_t i = 0; i < call.positions && call.divergence_weight != 0; ++i) {
    if (call.labels != nullptr && call.labels[i] == call.ignored_label) continue;
    const double grad = double(grad_output[i * call.grad_stride]) * call.normalizer;
    temperature += grad * call.divergence_weight * double(by_temperature[i]);
    weight += grad * double(by_temperature[call.positions + i]);
  }
  result[0] = S(temperature);
  result[1] = S(weight);
}

std::tuple<Tensor, Tensor, Tensor> softmax_divergence_backward(
    Tensor grad_output, std::optional<Tensor> /*saved*/, Tensor input, Tensor target, std::optional<Tensor> labels,
    Tensor temperature, Tensor divergence_weight, Tensor label_weight, Tensor beta, int64_t dim, std::string divergence,
    std::string reduction, int64_t ignore_index, bool input_gradient, bool target_gradient, bool scalar_gradients) {
  Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim, divergence,
                           reduction, ignore_index},
                          read_scalar);
  preparation.check_grad_output(grad_output);
  Tensor grad_input = input_gradient ? new_output(input) : nothing(input);
  Tensor grad_target = target_gradient ? new_output(target) : nothing(target);
  if (input_gradient) preparation.add(student_gradient, grad_input);
  if (target_gradient) preparation.add(teacher_gradient, grad_target);
  const Tensor grad = torch::stable::contiguous(grad_output);
  preparation.set_grad_output(grad, reduction);
  SoftmaxCall call = call_of(preparation);
  if (!scalar_gradients) {
    run(call);
    return {grad_input, grad_target, nothing(grad)};
  }
  const Tensor of_positions = torch::stable::new_empty(grad, std::array<int64_t, 2>{2, call.positions});
  Tensor result = torch::stable::new_empty(grad, std::array<int64_t, 1>{2});
  call.scalar_gradients = of_positions.mutable_data_ptr();
  run(call);
  dispatch_compute_type(call.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    sum_scalar_gradients(call, static_cast<S*>(result.mutable_data_ptr()));
  });
  return {grad_input, grad_target, result};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("softmax_divergence.native", TORCH_BOX(&kdkernels::cpu::softmax_divergence));
  m.impl("softmax_divergence_backward.native", TORCH_BOX(&kdkernels::cpu::softmax_divergence_backward));
}
