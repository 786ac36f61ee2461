// The fused BatchNorm layer and its backward.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "batch_norm_act_stats/binding.h"
#include "batch_norm_act_stats/plan.h"
#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"

namespace kdkernels::cpu {
namespace {

// One number per channel, or per sample and channel, that kernels read in whole vectors
template <class S>
using Numbers = std::vector<S>;

template <class S>
Numbers<S> numbers(int64_t count) {
  return Numbers<S>(size_t(count + BatchNormActCall::padding));
}

// The value of a parameter for a channel
template <class S>
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& given, double otherwise) : dense_(dense(given)), otherwise_(otherwise) {}
  double operator[](int64_t i) const {
    return dense_ ? double(static_cast<const S*>(dense_->const_data_ptr())[i]) : otherwise_;
  }

 private:
  std::optional<Tensor> dense_;
  double otherwise_;
};

// Scale and shift of each channel
template <class S>
struct Affines {
  Numbers<S> scale, shift;

  Affines(BatchNormActCall& call, const Tensor& running_mean, const Tensor& running_var,
          const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps)
      : scale(numbers<S>(call.channels)), shift(scale) {
    const Parameter<S> means(running_mean, 0), variances(running_var, 0), weights(weight, 1), biases(bias, 0);
    for (int64_t c = 0; c < call.channels; ++c) {
      const math::Affine affine(means[c], variances[c], weights[c], biases[c], eps);
      scale[size_t(c)] = S(affine.scale);
      shift[size_t(c)] = S(affine.shift);
    }
    call.scale = scale.data();
    call.shift = shift.data();
  }
};

// Merges what the items left, by channel or by sample and channel.
template <class S>
void write_statistics(const BatchNormActCall& call, Tensor& mean, Tensor& var) {
  S *const means = mean.mutable_data_ptr<S>(), *const variances = var.mutable_data_ptr<S>();
  for (int64_t n = 0; n < (call.by_image ? call.samples : 1); ++n) {
    for (int64_t c = 0; c < call.channels; ++c) {
      BatchNormActCall::Moments total;
      const int64_t first = call.by_image ? (call.rows ? n * call.pieces : n) : 0;
      const int64_t count = call.by_image && !call.rows ? 1 : call.pieces;
      for (int64_t i = first; i < first + count; ++i) total.merge(call.partial[i * call.channels + c]);
      means[n * call.channels + c] = S(total.mean);
      variances[n * call.channels + c] = S(total.variance(call.unbiased));
    }
  }
}

Tensor new_statistic(const Tensor& input, bool by_image) {
  if (by_image) {
    return torch::stable::new_empty(input, std::array<int64_t, 2>{input.size(0), input.size(1)}, compute_dtype(input));
  }
  return torch::stable::new_empty(input, std::array<int64_t, 1>{input.size(1)}, compute_dtype(input));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_stats(Tensor input, Tensor running_mean, Tensor running_var,
                                                        std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                        std::optional<Tensor> residual, double eps,
                                                        std::string activation, double negative_slope, bool by_image,
                                                        bool unbiased) {
  BatchNormActTensors tensors(input, new_output(input), activation, negative_slope, by_image, unbiased);
  BatchNormActCall call(tensors.arguments);
  call.output = tensors.output();
  if (residual) call.residual = tensors.readable_like_output(*residual);
  Tensor mean = new_statistic(input, by_image), var = new_statistic(input, by_image);
  std::vector<BatchNormActCall::Moments> partial(size_t(call.partials()));
  call.partial = partial.data();
  dispatch_compute_type(call.storage == Storage::float64, [&](auto type) {
    using S = typename decltype(type)::type;
    const Affines<S> affines(call, running_mean, running_var, weight, bias, eps);
    run_kernel(batch_norm_act_forward, call);
    write_statistics<S>(call, mean, var);
  });
  return {tensors.finish(), mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_act_stats_backward(std::optional<Tensor> grad_output,
                                                         std::optional<Tensor> grad_mean,
                                                         std::optional<Tensor> grad_var, Tensor input,
                                                         std::optional<Tensor> output, Tensor mean, Tensor running_mean,
                                                         Tensor running_var, std::optional<Tensor> weight,
                                                         std::optional<Tensor> bias, double eps, std::string activation,
                                                         double negative_slope, bool by_image, bool unbiased) {
  BatchNormActTensors tensors(input, new_output(input), activation, negative_slope, by_image, unbiased);
  BatchNormActCall call(tensors.arguments);
  call.grad_input = tensors.output();
  if (grad_output) call.grad_output = tensors.readable_like_output(*grad_output);
  std::optional<BatchNormActTensors> of_residual;
  if (output && grad_output) {
    call.output = tensors.readable_like_output(*output);
    of_residual.emplace(input, new_output(input), activation, negative_slope, by_image, unbiased);
    call.grad_residual = of_residual->output();
  }
  dispatch_compute_type(call.storage == Storage::float64, [&](auto type) {
    using S = typename decltype(type)::type;
    const Affines<S> affines(call, running_mean, running_var, weight, bias, eps);
    const int64_t statistics = mean.numel();
    Numbers<S> means = numbers<S>(statistics), constant = means, slope = means;
    const Parameter<S> given(mean, 0), by_mean(grad_mean, 0), by_variance(grad_var, 0);
    for (int64_t i = 0; i < statistics; ++i) {
      const math::StatisticsGradient<double> gradient(by_mean[i], by_variance[i], 0, call.count(),
                                                      grad_var ? call.divisor() : 1);
      means[size_t(i)] = S(given[i]);
      constant[size_t(i)] = S(gradient.constant);
      slope[size_t(i)] = S(gradient.slope);
    }
    call.mean = means.data();
    call.constant = constant.data();
    call.slope = slope.data();
    run_kernel(batch_norm_act_backward, call);
  });
  return {tensors.finish(), of_residual ? of_residual->finish() : nothing(input)};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("batch_norm_act_stats.native", TORCH_BOX(&kdkernels::cpu::batch_norm_act_stats));
  m.impl("batch_norm_act_stats_backward.native", TORCH_BOX(&kdkernels::cpu::batch_norm_act_stats_backward));
}
