// What a call of the fused BatchNorm layer asks for, in plain numbers: one description for both devices. No torch, no
// CUDA: kernels include this.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "batch_norm_act_stats/math.h"
#include "core/channels.h"

namespace kdkernels {

struct BatchNormActArguments : ChannelInput {
  ChannelTensor output;    // of the forward; of the backward if there is a residual, else missing
  ChannelTensor residual;  // of the forward
  ChannelTensor grad_output, grad_input, grad_residual;  // of the backward
  math::Activation activation;
  bool by_image = false;  // whether each sample has statistics of its own
  bool unbiased = false;

  KDKERNELS_INLINE double count() const { return (by_image ? 1 : double(samples)) * double(plane); }
  KDKERNELS_INLINE double divisor() const { return unbiased ? count() - 1 : count(); }
};

inline math::Activation activation_of(const std::string& name, double negative_slope) {
  using math::ActivationKind;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (name == "relu") return {ActivationKind::clamp, 0, infinity, 0};
  if (name == "relu6") return {ActivationKind::clamp, 0, 6, 0};
  if (name == "leaky_relu") return {ActivationKind::leaky_relu, 0, 0, negative_slope};
  if (name == "silu") return {ActivationKind::silu, 0, 0, 0};
  if (name == "hardswish") return {ActivationKind::hardswish, 0, 0, 0};
  return {};
}

}  // namespace kdkernels
