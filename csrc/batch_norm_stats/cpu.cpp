// Batch-norm statistics, the backward of the statistics tap, and the distance from the running statistics.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "batch_norm_stats/binding.h"
#include "batch_norm_stats/plan.h"
#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"

namespace kdkernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(Tensor original, bool unbiased) {
  const Tensor input = readable(original);
  BatchNormCall call(arguments_of(input, unbiased));
  std::vector<Moments> partial(size_t(call.groups() * call.channels));
  call.partial = partial.data();
  run_kernel(batch_norm_moments, call);
  Tensor mean = new_statistic(input), var = new_statistic(input), mean_error = new_statistic(input);
  dispatch_compute_type(call.storage == Storage::float64, [&](auto type) {
    using S = typename decltype(type)::type;
    S *const means = mean.mutable_data_ptr<S>(), *const variances = var.mutable_data_ptr<S>();
    S* const errors = mean_error.mutable_data_ptr<S>();
    for (int64_t c = 0; c < call.channels; ++c) {
      Moments total;
      for (int64_t g = 0; g < call.groups(); ++g) total.merge(partial[size_t(g * call.channels + c)]);
      means[c] = S(total.mean);
      variances[c] = S(total.variance(unbiased));
      errors[c] = S(total.mean - means[c]);
    }
  });
  return {mean, var, mean_error};
}

Tensor batch_norm_tap_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_mean,
                               std::optional<Tensor> grad_var, Tensor original, Tensor mean, Tensor mean_error,
                               bool unbiased) {
  TapTensors tensors(original, new_output(original), grad_output, unbiased);
  BatchNormCall call(tensors.arguments);
  const Tensor means = torch::stable::contiguous(mean), errors = torch::stable::contiguous(mean_error);
  const auto by_mean = dense(grad_mean), by_variance = dense(grad_var);
  dispatch_compute_type(call.storage == Storage::float64, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto number = [](const void* numbers, size_t c) {
      return numbers == nullptr ? 0.0 : double(static_cast<const S*>(numbers)[c]);
    };
    std::vector<S> slope(size_t(call.channels)), constant(size_t(call.channels));
    for (size_t c = 0; c < size_t(call.channels); ++c) {
      const math::StatisticsGradient<double> gradient(number(data_of(by_mean), c), number(data_of(by_variance), c),
                                                      number(errors.const_data_ptr(), c), call.count(),
                                                      by_variance ? call.divisor() : 1);
      slope[c] = S(gradient.slope);
      constant[c] = S(gradient.constant);
    }
    call.mean = means.const_data_ptr();
    call.slope = slope.data();
    call.constant = constant.data();
    run_kernel(batch_norm_gradient, call);
  });
  return tensors.finish();
}

// Calls body(layer, first channel, distance) for each layer; their statistics lie one after another in flat tensors.
template <class Body>
void for_each_layer(const std::vector<int64_t>& channels, math::StatDistance distance, const Body& body) {
  int64_t first = 0;
  for (size_t layer = 0; layer < channels.size(); ++layer) {
    distance.channels = double(channels[layer]);
    body(layer, first, distance);
    first += channels[layer];
  }
}

// The statistics of each channel
template <class S>
struct Channels {
  const S* data[4];

  explicit Channels(const FourTensors& statistics) {
    for (size_t i = 0; i < 4; ++i) data[i] = statistics[i].template const_data_ptr<S>();
  }
  math::StatDistance::Channel operator[](int64_t c) const {
    return {double(data[0][c]), double(data[1][c]), double(data[2][c]), double(data[3][c])};
  }
};

Tensor batch_norm_stat_distances(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var,
                                 std::vector<int64_t> channels, std::string mode, std::string moment,
                                 std::string reduction, double mean_weight, double var_weight) {
  const math::StatDistance asked = stat_distance(mode, moment, reduction, mean_weight, var_weight);
  Tensor losses = torch::stable::new_empty(mean, std::array<int64_t, 1>{int64_t(channels.size())});
  const FourTensors statistics = dense_statistics(mean, var, running_mean, running_var);
  dispatch_compute_type(is_double(mean), [&](auto type) {
    using S = typename decltype(type)::type;
    const Channels<S> channel(statistics);
    for_each_layer(channels, asked, [&](size_t layer, int64_t first, const math::StatDistance& distance) {
      math::StatDistance::Sums sums;
      for (int64_t c = 0; c < channels[layer]; ++c) distance.measure(channel[first + c], sums);
      losses.mutable_data_ptr<S>()[layer] = S(distance.value(sums));
    });
  });
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_stat_distances_backward(
    Tensor grad_losses, Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, std::vector<int64_t> channels,
    std::string mode, std::string moment, std::string reduction, double mean_weight, double var_weight) {
  const math::StatDistance asked = stat_distance(mode, moment, reduction, mean_weight, var_weight);
  FourTensors grads = new_gradients(mean);
  const FourTensors statistics = dense_statistics(mean, var, running_mean, running_var);
  dispatch_compute_type(is_double(mean), [&](auto type) {
    using S = typename decltype(type)::type;
    const Channels<S> channel(statistics);
    const Tensor incoming = torch::stable::contiguous(grad_losses);
    S* out[4];
    for (size_t i = 0; i < 4; ++i) out[i] = grads[i].mutable_data_ptr<S>();
    for_each_layer(channels, asked, [&](size_t layer, int64_t first, const math::StatDistance& distance) {
      const double grad = double(incoming.const_data_ptr<S>()[layer]);
      math::StatDistance::Sums sums;
      for (int64_t c = 0; c < channels[layer]; ++c) distance.measure(channel[first + c], sums);
      for (int64_t c = first; c < first + channels[layer]; ++c) {
        const auto gradient = distance.gradients(channel[c], sums);
        out[0][c] = S(grad * gradient.mean);
        out[1][c] = S(grad * gradient.variance);
        out[2][c] = S(grad * gradient.running_mean);
        out[3][c] = S(grad * gradient.running_variance);
      }
    });
  });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("batch_norm_stats.native", TORCH_BOX(&kdkernels::cpu::batch_norm_stats));
  m.impl("batch_norm_tap_backward.native", TORCH_BOX(&kdkernels::cpu::batch_norm_tap_backward));
  m.impl("batch_norm_stat_distances.native", TORCH_BOX(&kdkernels::cpu::batch_norm_stat_distances));
  m.impl("batch_norm_stat_distances_backward.native", TORCH_BOX(&kdkernels::cpu::batch_norm_stat_distances_backward));
}
