// Batch-norm statistics, the backward of the statistics tap, and the distance from the running statistics.
#include "batch_norm_stats/cuda_kernels.h"

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_stats/layout.h"
#include "core/cuda/binding.h"

namespace kdkernels::cuda {
namespace {

// A call on an input that can be taken as rows or as planes
BatchNormCall prepare(const Tensor& input) {
  BatchNormCall call;
  call.storage = storage_of(input);
  call.samples = input.size(0);
  call.channels = input.size(1);
  call.plane = 1;
  for (int64_t d = 2; d < input.dim(); ++d) call.plane *= input.size(d);
  call.rows = prefers_rows(input);
  call.input = *as_layout(input, call.rows);
  return call;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(Tensor original, bool unbiased) {
  const OnDevice device(original);
  // Odd strides are copied away.
  const Tensor input = as_layout(original, prefers_rows(original)) ? original : torch::stable::contiguous(original);
  BatchNormCall call = prepare(input);
  call.unbiased = unbiased;
  const std::array<int64_t, 1> shape{call.channels};
  Tensor mean = torch::stable::new_empty(input, shape, compute_dtype(input));
  Tensor var = torch::stable::new_empty(input, shape, compute_dtype(input));
  Tensor mean_error = torch::stable::new_empty(input, shape, compute_dtype(input));
  call.mean = mean.mutable_data_ptr();
  call.variance = var.mutable_data_ptr();
  call.mean_error = mean_error.mutable_data_ptr();
  if (call.channels == 0) return {mean, var, mean_error};
  const BatchNormPlan plan = plan_batch_norm(call, false);
  const Tensor partial = workspace(input, plan.splits * call.channels * int64_t(sizeof(Moments)));
  call.partial = static_cast<Moments*>(partial.mutable_data_ptr());
  device.check(launch_batch_norm_stats(call, plan, device.stream()));
  return {mean, var, mean_error};
}

Tensor batch_norm_tap_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_mean,
                               std::optional<Tensor> grad_var, Tensor original, Tensor mean, Tensor mean_error,
                               bool unbiased) {
  const OnDevice device(original);
  Tensor output = torch::stable::empty_like(original);
  if (original.numel() == 0) return output;
  // Where input and output cannot be taken alike, a contiguous pair stands in for them.
  const bool rows = prefers_rows(original);
  const bool direct = as_layout(original, rows) && as_layout(output, rows);
  const Tensor input = direct ? original : torch::stable::contiguous(original);
  Tensor target = direct ? output : torch::stable::empty_like(input);
  BatchNormCall call = prepare(input);
  call.unbiased = unbiased;
  call.output = *as_layout(target, call.rows);
  Tensor grad = target;
  if (grad_output) {
    grad = *grad_output;
    if (!as_layout(grad, call.rows)) {
      grad = torch::stable::empty_like(target);
      torch::stable::copy_(grad, *grad_output);
    }
    call.grad_output = *as_layout(grad, call.rows);
  }
  const auto dense = [](const std::optional<Tensor>& source) {
    return source ? std::optional<Tensor>(torch::stable::contiguous(*source)) : std::nullopt;
  };
  const auto data = [](const std::optional<Tensor>& source) { return source ? source->const_data_ptr() : nullptr; };
  const auto means = dense(mean), errors = dense(mean_error), by_mean = dense(grad_mean), by_var = dense(grad_var);
  call.given_mean = data(means);
  call.given_mean_error = data(errors);
  call.grad_mean = data(by_mean);
  call.grad_variance = data(by_var);
  device.check(launch_batch_norm_gradient(call, plan_batch_norm(call, true), device.stream()));
  if (!direct) torch::stable::copy_(output, target);
  return output;
}

// Runs the distances of all layers, so many at a time as one launch takes.
void run_distances(const OnDevice& device, StatDistanceCall call, const std::vector<int64_t>& channels,
                   const std::string& mode, const std::string& moment, bool backward) {
  const math::StatDistance distance = stat_distance(mode, moment, 0);
  call.mode = distance.mode;
  call.root = distance.root;
  const size_t size = call.is_double ? 8 : 4;
  for (size_t done = 0; done < channels.size(); done += size_t(call.layers)) {
    call.layers = int(std::min(channels.size() - done, size_t(layers_of_launch)));
    for (int i = 0; i < call.layers; ++i) {
      call.first_channel[i + 1] = call.first_channel[i] + channels[done + size_t(i)];
    }
    device.check(launch_stat_distances(call, backward, device.stream()));
    const size_t bytes = size_t(call.layers) * size;
    if (backward) {
      call.grad_losses = static_cast<const char*>(call.grad_losses) + bytes;
    } else {
      call.losses = static_cast<char*>(call.losses) + bytes;
    }
    call.first_channel[0] = call.first_channel[call.layers];
  }
}

std::array<Tensor, 4> dense_statistics(const Tensor& mean, const Tensor& var, const Tensor& running_mean,
                                       const Tensor& running_var, StatDistanceCall& call) {
  std::array<Tensor, 4> kept{torch::stable::contiguous(mean), torch::stable::contiguous(var),
                             torch::stable::contiguous(running_mean), torch::stable::contiguous(running_var)};
  for (size_t i = 0; i < 4; ++i) call.statistics[i] = kept[i].const_data_ptr();
  call.is_double = mean.scalar_type() == ScalarType::Double;
  return kept;
}

Tensor batch_norm_stat_distances(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var,
                                 std::vector<int64_t> channels, std::string mode, std::string moment) {
  const OnDevice device(mean);
  StatDistanceCall call;
  const auto kept = dense_statistics(mean, var, running_mean, running_var, call);
  Tensor losses = torch::stable::new_empty(mean, std::array<int64_t, 1>{int64_t(channels.size())});
  call.losses = losses.mutable_data_ptr();
  run_distances(device, call, channels, mode, moment, false);
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_stat_distances_backward(Tensor grad_losses, Tensor mean,
                                                                              Tensor var, Tensor running_mean,
                                                                              Tensor running_var,
                                                                              std::vector<int64_t> channels,
                                                                              std::string mode, std::string moment) {
  const OnDevice device(mean);
  StatDistanceCall call;
  const auto kept = dense_statistics(mean, var, running_mean, running_var, call);
  const std::array<int64_t, 1> shape{mean.size(0)};
  std::array<Tensor, 4> grads{torch::stable::new_empty(mean, shape), torch::stable::new_empty(mean, shape),
                              torch::stable::new_empty(mean, shape), torch::stable::new_empty(mean, shape)};
  for (size_t i = 0; i < 4; ++i) call.gradients[i] = grads[i].mutable_data_ptr();
  const Tensor incoming = torch::stable::contiguous(grad_losses);
  call.grad_losses = incoming.const_data_ptr();
  run_distances(device, call, channels, mode, moment, true);
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace kdkernels::cuda

KDKERNELS_REGISTER(m) {
  m.impl("batch_norm_stats.native", TORCH_BOX(&kdkernels::cuda::batch_norm_stats));
  m.impl("batch_norm_tap_backward.native", TORCH_BOX(&kdkernels::cuda::batch_norm_tap_backward));
  m.impl("batch_norm_stat_distances.native", TORCH_BOX(&kdkernels::cuda::batch_norm_stat_distances));
  m.impl("batch_norm_stat_distances_backward.native", TORCH_BOX(&kdkernels::cuda::batch_norm_stat_distances_backward));
}
