// From torch's tensors to the arguments of a call: what the bindings of both devices share.
#pragma once

#include <array>
#include <optional>

#include "batch_norm_stats/arguments.h"
#include "core/channel_layout.h"
#include "core/dispatch.h"

namespace kdkernels {

inline BatchNormArguments arguments_of(const Tensor& input, bool unbiased) {
  BatchNormArguments arguments;
  static_cast<ChannelInput&>(arguments) = channel_input(input);
  arguments.unbiased = unbiased;
  return arguments;
}

// The big tensors of the tap's backward, in one layout
class TapTensors {
 public:
  BatchNormArguments arguments;

  TapTensors(const Tensor& original, const Tensor& result, const std::optional<Tensor>& grad_output, bool unbiased)
      : big_(original, result,
             as_layout(original, prefers_rows(original)) && as_layout(result, prefers_rows(original))) {
    arguments = arguments_of(big_.input, unbiased);
    arguments.output = *as_layout(big_.output, arguments.rows);
    if (!grad_output) return;
    grad_output_ = *grad_output;
    if (!as_layout(*grad_output_, arguments.rows)) {
      grad_output_ = torch::stable::empty_like(big_.output);
      torch::stable::copy_(*grad_output_, *grad_output);
    }
    arguments.grad_output = *as_layout(*grad_output_, arguments.rows);
  }

  Tensor finish() { return big_.finish(); }

 private:
  InputAndOutput big_;
  std::optional<Tensor> grad_output_;
};

// One number per channel, in the dtype that results have
inline Tensor new_statistic(const Tensor& input) {
  return torch::stable::new_empty(input, std::array<int64_t, 1>{input.size(1)}, compute_dtype(input));
}

// The statistics that a distance compares, or their gradients: mean, variance, running mean, running variance
using FourTensors = std::array<Tensor, 4>;

inline FourTensors dense_statistics(const Tensor& mean, const Tensor& var, const Tensor& running_mean,
                                    const Tensor& running_var) {
  return {torch::stable::contiguous(mean), torch::stable::contiguous(var), torch::stable::contiguous(running_mean),
          torch::stable::contiguous(running_var)};
}

inline FourTensors new_gradients(const Tensor& mean) {
  const std::array<int64_t, 1> shape{mean.size(0)};
  return {torch::stable::new_empty(mean, shape), torch::stable::new_empty(mean, shape),
          torch::stable::new_empty(mean, shape), torch::stable::new_empty(mean, shape)};
}

}  // namespace kdkernels
