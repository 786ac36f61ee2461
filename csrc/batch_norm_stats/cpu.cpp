// Batch-norm statistics, the backward of the statistics tap, and the distance from the running statistics.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "batch_norm_stats/layout.h"
#include "batch_norm_stats/plan.h"
#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t plane_values = 512;  // planes of a channel are taken together up to so many values
constexpr int64_t row_values = 65536;  // and rows of all channels up to so many: they stay in the second-level cache

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
  const int64_t fitting =
      call.rows ? row_values / std::max<int64_t>(1, call.channels) : plane_values / std::max<int64_t>(1, call.plane);
  call.group = std::max<int64_t>(1, fitting);
  return call;
}

template <class Kernel>
void run(const BatchNormCall& call, const Kernel& kernel) {
  const int64_t items = call.rows ? call.groups() : call.groups() * call.channels;
  const int64_t cost = call.rows ? call.group * call.channels : call.group * call.plane;
  for_each_chunk(Chunks(items, cost), [&](int64_t, int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(Tensor original, bool unbiased) {
  // Odd strides are copied away.
  const Tensor input = as_layout(original, prefers_rows(original)) ? original : torch::stable::contiguous(original);
  BatchNormCall call = prepare(input);
  std::vector<Moments> partial(size_t(call.groups() * call.channels));
  call.partial = partial.data();
  run(call, [](const BatchNormCall& c, int64_t begin, int64_t end) { batch_norm_moments(c, begin, end); });
  const std::array<int64_t, 1> shape{call.channels};
  Tensor mean = torch::stable::new_empty(input, shape, compute_dtype(input));
  Tensor var = torch::stable::new_empty(input, shape, compute_dtype(input));
  Tensor mean_error = torch::stable::new_empty(input, shape, compute_dtype(input));
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
  Tensor output = new_output(original);
  // Where input and output cannot be taken alike, a contiguous pair stands in for them.
  const bool rows = prefers_rows(original);
  const bool direct = as_layout(original, rows) && as_layout(output, rows);
  const Tensor input = direct ? original : torch::stable::contiguous(original);
  Tensor target = direct ? output : torch::stable::empty_like(input);
  BatchNormCall call = prepare(input);
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
  const double count = double(call.samples * call.plane), divisor = unbiased ? count - 1 : count;
  dispatch_compute_type(call.storage == Storage::float64, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto dense = [](const std::optional<Tensor>& source) {
      return source ? std::optional<Tensor>(torch::stable::contiguous(*source)) : std::nullopt;
    };
    const auto means = dense(mean), errors = dense(mean_error), by_mean = dense(grad_mean), by_var = dense(grad_var);
    const S *const mean_data = means->template const_data_ptr<S>(), *const error = errors->template const_data_ptr<S>();
    const S* const d_mean = by_mean ? by_mean->template const_data_ptr<S>() : nullptr;
    const S* const d_var = by_var ? by_var->template const_data_ptr<S>() : nullptr;
    std::vector<S> through_mean(size_t(call.channels)), through_variance(size_t(call.channels));
    for (size_t c = 0; c < size_t(call.channels); ++c) {
      const double slope = d_var == nullptr ? 0 : double(d_var[c]) * 2 / divisor;
      through_variance[c] = S(slope);
      // x - mean - error, the error of all values of a channel taken together
      through_mean[c] = S((d_mean == nullptr ? 0 : double(d_mean[c]) / count) - slope * double(error[c]));
    }
    call.mean = mean_data;
    call.through_mean = through_mean.data();
    call.through_variance = through_variance.data();
    run(call, [](const BatchNormCall& c, int64_t begin, int64_t end) { batch_norm_gradient(c, begin, end); });
  });
  if (!direct) torch::stable::copy_(output, target);
  return output;
}

// All layers' statistics lie one after another in flat tensors; body(layer, first channel, distance) for each.
template <class Body>
void for_each_layer(const std::vector<int64_t>& channels, const std::string& mode, const std::string& moment,
                    const Body& body) {
  int64_t first = 0;
  for (size_t layer = 0; layer < channels.size(); ++layer) {
    body(layer, first, stat_distance(mode, moment, channels[layer]));
    first += channels[layer];
  }
}

// The four statistics of every channel, read as S
template <class S>
struct Channels {
  std::array<Tensor, 4> kept;
  const S* data[4];

  Channels(const Tensor& mean, const Tensor& var, const Tensor& running_mean, const Tensor& running_var)
      : kept{torch::stable::contiguous(mean), torch::stable::contiguous(var), torch::stable::contiguous(running_mean),
             torch::stable::contiguous(running_var)} {
    for (size_t i = 0; i < 4; ++i) data[i] = kept[i].template const_data_ptr<S>();
  }
  math::StatDistance::Channel operator[](int64_t c) const {
    return {double(data[0][c]), double(data[1][c]), double(data[2][c]), double(data[3][c])};
  }
};

Tensor batch_norm_stat_distances(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var,
                                 std::vector<int64_t> channels, std::string mode, std::string moment) {
  Tensor losses = torch::stable::new_empty(mean, std::array<int64_t, 1>{int64_t(channels.size())});
  dispatch_compute_type(mean.scalar_type() == ScalarType::Double, [&](auto type) {
    using S = typename decltype(type)::type;
    const Channels<S> channel(mean, var, running_mean, running_var);
    for_each_layer(channels, mode, moment, [&](size_t layer, int64_t first, const math::StatDistance& distance) {
      math::StatDistance::Sums sums;
      for (int64_t c = 0; c < channels[layer]; ++c) distance.measure(channel[first + c], sums);
      losses.mutable_data_ptr<S>()[layer] = S(distance.value(sums));
    });
  });
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_stat_distances_backward(Tensor grad_losses, Tensor mean,
                                                                              Tensor var, Tensor running_mean,
                                                                              Tensor running_var,
                                                                              std::vector<int64_t> channels,
                                                                              std::string mode, std::string moment) {
  const std::array<int64_t, 1> shape{mean.size(0)};
  std::array<Tensor, 4> grads{torch::stable::new_empty(mean, shape), torch::stable::new_empty(mean, shape),
                              torch::stable::new_empty(mean, shape), torch::stable::new_empty(mean, shape)};
  dispatch_compute_type(mean.scalar_type() == ScalarType::Double, [&](auto type) {
    using S = typename decltype(type)::type;
    const Channels<S> channel(mean, var, running_mean, running_var);
    const Tensor incoming = torch::stable::contiguous(grad_losses);
    S* out[4];
    for (size_t i = 0; i < 4; ++i) out[i] = grads[i].mutable_data_ptr<S>();
    for_each_layer(channels, mode, moment, [&](size_t layer, int64_t first, const math::StatDistance& distance) {
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
