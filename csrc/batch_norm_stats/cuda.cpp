// Batch-norm statistics, the backward of the statistics tap, and the distance from the running statistics.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_stats/binding.h"
#include "batch_norm_stats/cuda_kernels.h"
#include "core/cuda/binding.h"

namespace kdkernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(Tensor original, bool unbiased) {
  const OnDevice device(original);
  const Tensor input = readable(original);
  BatchNormCall call{arguments_of(input, unbiased)};
  Tensor mean = new_statistic(input), var = new_statistic(input), mean_error = new_statistic(input);
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
  TapTensors tensors(original, output, grad_output, unbiased);
  BatchNormCall call{tensors.arguments};
  const auto means = dense(mean), errors = dense(mean_error), by_mean = dense(grad_mean), by_variance = dense(grad_var);
  call.given_mean = data_of(means);
  call.given_mean_error = data_of(errors);
  call.grad_mean = data_of(by_mean);
  call.grad_variance = data_of(by_variance);
  device.check(launch_batch_norm_gradient(call, plan_batch_norm(call, true), device.stream()));
  return tensors.finish();
}

// Runs the distances of all layers, as many at a time as one launch takes.
void run_distances(const OnDevice& device, StatDistanceCall call, const std::vector<int64_t>& channels, bool backward) {
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

StatDistanceCall call_of(const FourTensors& statistics, const math::StatDistance& distance) {
  StatDistanceCall call;
  call.distance = distance;
  for (size_t i = 0; i < 4; ++i) call.statistics[i] = statistics[i].const_data_ptr();
  call.is_double = is_double(statistics[0]);
  return call;
}

Tensor batch_norm_stat_distances(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var,
                                 std::vector<int64_t> channels, std::string mode, std::string moment,
                                 std::string reduction, double mean_weight, double var_weight) {
  const OnDevice device(mean);
  const FourTensors statistics = dense_statistics(mean, var, running_mean, running_var);
  StatDistanceCall call = call_of(statistics, stat_distance(mode, moment, reduction, mean_weight, var_weight));
  Tensor losses = torch::stable::new_empty(mean, std::array<int64_t, 1>{int64_t(channels.size())});
  call.losses = losses.mutable_data_ptr();
  run_distances(device, call, channels, false);
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_stat_distances_backward(
    Tensor grad_losses, Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, std::vector<int64_t> channels,
    std::string mode, std::string moment, std::string reduction, double mean_weight, double var_weight) {
  const OnDevice device(mean);
  const FourTensors statistics = dense_statistics(mean, var, running_mean, running_var);
  StatDistanceCall call = call_of(statistics, stat_distance(mode, moment, reduction, mean_weight, var_weight));
  FourTensors grads = new_gradients(mean);
  for (size_t i = 0; i < 4; ++i) call.gradients[i] = grads[i].mutable_data_ptr();
  const Tensor incoming = torch::stable::contiguous(grad_losses);
  call.grad_losses = incoming.const_data_ptr();
  run_distances(device, call, channels, true);
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
