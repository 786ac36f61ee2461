// How the CPU cuts the work of the batch-norm statistics, by size alone, and the kernels that do it. No torch.
#pragma once

#include <algorithm>

#include "batch_norm_stats/arguments.h"
#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"

namespace kdkernels::cpu {

constexpr int64_t plane_values = 512;  // planes of a channel are taken together up to this many values,
constexpr int64_t row_values = 65536;  // and rows of all channels up to this many: the second-level cache holds them

// In more precision than a double where the machine has it, so that float64 results are rounded once.
using Moments = math::Moments<long double>;

struct BatchNormCall : BatchNormArguments {
  int64_t group;  // samples, or rows, that one item takes together

  // Statistics: item i leaves its moments in partial[i] (planes) or partial[i * channels + c] (rows).
  Moments* partial = nullptr;

  // Gradient, by channel, in double if the storage is
  const void *mean = nullptr, *constant = nullptr, *slope = nullptr;

  explicit BatchNormCall(const BatchNormArguments& arguments) : BatchNormArguments(arguments) {
    group = rows ? row_values / std::max<int64_t>(1, channels) : plane_values / std::max<int64_t>(1, plane);
    group = std::max<int64_t>(1, group);
  }

  int64_t groups() const { return ((rows ? samples * plane : samples) + group - 1) / group; }

  // Planes: item = group * channels + channel. Rows: item = group of rows, all channels.
  Chunks chunks() const {
    return rows ? Chunks(groups(), group * channels) : Chunks(groups() * channels, group * plane);
  }
};

KDKERNELS_KERNEL(void, batch_norm_moments, (const BatchNormCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, batch_norm_gradient, (const BatchNormCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
