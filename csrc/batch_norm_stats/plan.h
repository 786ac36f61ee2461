// What the kernels of the batch-norm statistics are asked to do, in plain numbers and pointers.
#pragma once

#include "batch_norm_stats/channel_tensor.h"
#include "batch_norm_stats/math.h"
#include "core/cpu/capability.h"
#include "core/cpu/storage.h"

namespace kdkernels::cpu {

// In more precision than a double where the machine has it, so that float64 results are rounded once.
using Moments = math::Moments<long double>;

struct BatchNormCall {
  Storage storage = Storage::float32;
  bool rows = false;
  int64_t samples = 0, channels = 0, plane = 0;  // plane: values of one sample and channel
  int64_t group = 1;                             // samples, or rows, that one item takes together
  ChannelTensor input, grad_output, output;

  // Statistics: item i leaves its moments in partial[i] (planes) or partial[i * channels + c] (rows).
  Moments* partial = nullptr;

  // Gradient, by channel, in double if the storage is
  const void *mean = nullptr, *through_mean = nullptr, *through_variance = nullptr;

  int64_t groups() const { return ((rows ? samples * plane : samples) + group - 1) / group; }
};

// Items begin to end. Planes: item = group * channels + channel. Rows: item = group of rows, all channels.
KDKERNELS_KERNEL(void, batch_norm_moments, (const BatchNormCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, batch_norm_gradient, (const BatchNormCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
