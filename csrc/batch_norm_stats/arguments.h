// What a call of the batch-norm statistics asks for, in plain numbers: one description for both devices. No torch, no
// CUDA: kernels include this.
#pragma once

#include <cstdint>
#include <string>

#include "batch_norm_stats/math.h"
#include "core/channels.h"

namespace kdkernels {

// An activation, and for the backward of its tap the gradients that belong to it
struct BatchNormArguments : ChannelInput {
  ChannelTensor grad_output, output;
  bool unbiased = false;

  KDKERNELS_INLINE double count() const { return double(samples) * double(plane); }
  KDKERNELS_INLINE double divisor() const { return unbiased ? count() - 1 : count(); }
};

inline math::StatDistance stat_distance(const std::string& mode, const std::string& moment,
                                        const std::string& reduction, double mean_weight, double var_weight) {
  const math::StatMode stat_mode = mode == "l2"        ? math::StatMode::l2
                                   : mode == "l1"      ? math::StatMode::l1
                                   : mode == "squared" ? math::StatMode::squared
                                                       : math::StatMode::gaussian_kl;
  return {stat_mode, moment == "std", reduction == "sum", mean_weight, var_weight};
}

}  // namespace kdkernels
