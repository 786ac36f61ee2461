// Divergences between softmax distributions, with the cross-entropy of hard labels.
#include <optional>
#include <tuple>

#include "core/cuda/binding.h"
#include "softmax_divergence/binding.h"
#include "softmax_divergence/cuda_kernels.h"

namespace kdkernels::cuda {
namespace {

using Preparation = SoftmaxPreparation<ScalarArgument>;

SoftmaxCall call_of(const Preparation& preparation) {
  const SoftmaxLayout<max_dims> layout = preparation.layout();
  STD_TORCH_CHECK(layout.outer_dims <= most_outer_dims, "logits whose positions cannot be described by ",
                  most_outer_dims + 1, " strides; make them contiguous");
  return {layout.narrowed<most_outer_dims>(), preparation.arguments};
}

// Runs the forward, which fills the loss, and the statistics if there are any.
void run_forward(const OnDevice& device, SoftmaxCall call, const Tensor& like) {
  const SoftmaxPlan plan = plan_softmax(call, false, device.most_shared_bytes());
  const Tensor partial = workspace(like, int64_t(plan.grid) * int64_t(sizeof(double) + sizeof(int64_t)));
  call.partial = static_cast<double*>(partial.mutable_data_ptr());
  call.kept = reinterpret_cast<int64_t*>(call.partial + plan.grid);
  device.check(launch_softmax_forward(call, plan, device.stream()));
}

Tensor new_statistics(const Tensor& like, const Preparation& preparation) {
  const std::array<int64_t, 2> shape{statistics, preparation.positions() + 1};
  return torch::stable::new_empty(like, shape, preparation.dtype());
}

std::tuple<Tensor, Tensor> softmax_divergence(Tensor input, Tensor target, std::optional<Tensor> labels,
                                              Tensor temperature, Tensor divergence_weight, Tensor label_weight,
                                              Tensor beta, int64_t dim, std::string divergence, std::string reduction,
                                              int64_t ignore_index, std::string save) {
  STD_TORCH_CHECK(save != "gradient", "the CUDA kernels save statistics or nothing");
  const OnDevice device(input);
  const SoftmaxTensors given{input, target, labels,     temperature, divergence_weight, label_weight,
                             beta,  dim,    divergence, reduction,   ignore_index};
  const Preparation preparation(given, scalar_argument);
  SoftmaxCall call = call_of(preparation);
  Tensor loss = preparation.new_loss(given);
  Tensor saved = save == "statistics" ? new_statistics(input, preparation) : nothing(loss);
  call.loss = loss.mutable_data_ptr();
  call.loss_stride = reduction == "none" ? 1 : 0;
  if (save == "statistics") call.statistics = saved.mutable_data_ptr();
  if (call.positions > 0 || reduction != "none") run_forward(device, call, input);
  return {loss, saved};
}

std::tuple<Tensor, Tensor, Tensor> softmax_divergence_backward(
    Tensor grad_output, std::optional<Tensor> saved, Tensor input, Tensor target, std::optional<Tensor> labels,
    Tensor temperature, Tensor divergence_weight, Tensor label_weight, Tensor beta, int64_t dim, std::string divergence,
    std::string reduction, int64_t ignore_index, bool input_gradient, bool target_gradient, bool scalar_gradients) {
  STD_TORCH_CHECK(!scalar_gradients, "the CUDA kernels compute no gradients of scalars");
  const OnDevice device(input);
  Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim, divergence,
                           reduction, ignore_index},
                          scalar_argument);
  preparation.check_grad_output(grad_output);
  Tensor grad_input = input_gradient ? torch::stable::empty_like(input) : nothing(input);
  Tensor grad_target = target_gradient ? torch::stable::empty_like(target) : nothing(target);
  if (preparation.positions() == 0) return {grad_input, grad_target, nothing(grad_output)};
  const Tensor statistics = saved ? *saved : new_statistics(input, preparation);
  if (!saved) {
    SoftmaxCall call = call_of(preparation);
    const Tensor loss = torch::stable::new_empty(input, std::array<int64_t, 1>{1}, preparation.dtype());
    call.loss = loss.mutable_data_ptr();
    call.statistics = statistics.mutable_data_ptr();
    run_forward(device, call, input);
  }
  if (input_gradient) preparation.add(student_gradient, grad_input);
  if (target_gradient) preparation.add(teacher_gradient, grad_target);
  const Tensor grad = torch::stable::contiguous(grad_output);
  preparation.set_grad_output(grad, reduction);
  SoftmaxCall call = call_of(preparation);
  call.statistics = const_cast<void*>(statistics.const_data_ptr());
  device.check(launch_softmax_backward(call, plan_softmax(call, true, 0), device.stream()));
  return {grad_input, grad_target, nothing(grad_output)};
}

}  // namespace
}  // namespace kdkernels::cuda

KDKERNELS_REGISTER(m) {
  m.impl("softmax_divergence.native", TORCH_BOX(&kdkernels::cuda::softmax_divergence));
  m.impl("softmax_divergence_backward.native", TORCH_BOX(&kdkernels::cuda::softmax_divergence_backward));
}
