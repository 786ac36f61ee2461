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

// One number for each channel of a wide row, or for each sample and channel of one, that kernels read in whole vectors
template <class S>
class Numbers {
 public:
  explicit Numbers(const BatchNormActCall& call, int64_t samples = 1)
      : call_(call), numbers_(size_t(samples * call.wide() + BatchNormActCall::padding)) {}
  void set(int64_t sample, int64_t channel, double value) {
    for (int64_t c = channel; c < call_.wide(); c += call_.channels) {
      numbers_[size_t(sample * call_.wide() + c)] = S(value);
    }
  }
  const void* data() const { return numbers_.data(); }

 private:
  const BatchNormActCall& call_;
  std::vector<S> numbers_;
};

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
      : scale(call), shift(call) {
    const Parameter<S> means(running_mean, 0), variances(running_var, 0), weights(weight, 1), biases(bias, 0);
    for (int64_t c = 0; c < call.channels; ++c) {
      const math::Affine affine(means[c], variances[c], weights[c], biases[c], eps);
      scale.set(0, c, affine.scale);
      shift.set(0, c, affine.shift);
    }
    call.scale = scale.data();
    call.shift = shift.data();
  }
};

// Merges the parts of the batch, or of each sample, channel by channel; see math::Moments::merge.
template <class S>
void write_statistics(const BatchNormActCall& call, Tensor& mean, Tensor& var) {
  S *const means = mean.mutable_data_ptr<S>(), *const variances = var.mutable_data_ptr<S>();
  const int64_t sets = call.by_image ? call.samples : 1, parts = sets == 0 ? 0 : call.parts() / sets;
  for (int64_t set = 0; set < sets; ++set) {
    double *const merged = call.means_of(set * parts), *const squares = call.squares_of(set * parts);
    double total = double(call.count_of(set * parts));
    for (int64_t part = set * parts + 1; part < (set + 1) * parts; ++part) {
      const double count = double(call.count_of(part)), share = count / (total + count);
      const double *const other = call.means_of(part), *const others_squares = call.squares_of(part);
      for (int64_t c = 0; c < call.channels; ++c) {
        const double distance = other[c] - merged[c];
        merged[c] += distance * share;
        squares[c] += others_squares[c] + distance * distance * total * share;
      }
      total += count;
    }
    for (int64_t c = 0; c < call.channels; ++c) {
      means[set * call.channels + c] = S(merged[c]);
      variances[set * call.channels + c] = S(squares[c] / (call.unbiased ? total - 1 : total));
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
  tensors.arguments.output = tensors.output();
  if (residual) tensors.arguments.residual = tensors.readable_like_output(*residual);
  BatchNormActCall call(tensors.arguments);
  Tensor mean = new_statistic(input, by_image), var = new_statistic(input, by_image);
  std::vector<double> partial(size_t(2 * call.parts() * call.channels));
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
  BatchNormActArguments& arguments = tensors.arguments;
  arguments.grad_input = tensors.output();
  if (grad_output) arguments.grad_output = tensors.readable_like_output(*grad_output);
  std::optional<BatchNormActTensors> of_residual;
  if (output && grad_output) {
    arguments.output = tensors.readable_like_output(*output);
    of_residual.emplace(input, new_output(input), activation, negative_slope, by_image, unbiased);
    arguments.grad_residual = of_residual->output();
  }
  BatchNormActCall call(arguments);
  dispatch_compute_type(call.storage == Storage::float64, [&](auto type) {
    using S = typename decltype(type)::type;
    const Affines<S> affines(call, running_mean, running_var, weight, bias, eps);
    const int64_t sets = by_image ? call.samples : 1;
    Numbers<S> means(call, sets), constant(call, sets), slope(call, sets);
    const Parameter<S> given(mean, 0), by_mean(grad_mean, 0), by_variance(grad_var, 0);
    for (int64_t set = 0; set < sets; ++set) {
      for (int64_t c = 0; c < call.channels; ++c) {
        const int64_t i = set * call.channels + c;
        const math::StatisticsGradient<double> gradient(by_mean[i], by_variance[i], 0, call.count(),
                                                        grad_var ? call.divisor() : 1);
        means.set(set, c, given[i]);
        constant.set(set, c, gradient.constant);
        slope.set(set, c, gradient.slope);
      }
    }
    call.mean = means.data();
    call.constant = constant.data();
    call.slope = slope.data();
    call.of_statistics = grad_mean || grad_var;
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
