// How the CPU cuts the work of the fused BatchNorm layer, by size alone, and the kernels that do it. No torch.
#pragma once

#include <algorithm>

#include "batch_norm_act_stats/arguments.h"
#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"

namespace kdkernels::cpu {

struct BatchNormActCall : BatchNormActArguments {
  using Moments = math::Moments<double>;

  static constexpr int64_t plane_values = 512;    // planes of a channel are taken together up to this many values,
  static constexpr int64_t group_values = 16384;  // and rows of all channels up to this many;
  static constexpr int64_t block_values = 4096;   // the first-level cache holds this many
  static constexpr int64_t padding = 64;          // numbers behind the channels, so that whole vectors can be read

  int64_t group;    // samples, or rows, that one item takes together
  int64_t pieces;   // items that the samples or rows are divided into; by image, those of each sample
  int64_t divided;  // samples, or rows, that the pieces divide

  // By channel, in double if the storage is
  const void *scale = nullptr, *shift = nullptr;
  // Forward: item i leaves its moments in partial[i] (planes) or partial[i * channels + c] (rows).
  Moments* partial = nullptr;
  // Backward, by channel or by sample and channel
  const void *mean = nullptr, *constant = nullptr, *slope = nullptr;

  explicit BatchNormActCall(const BatchNormActArguments& arguments) : BatchNormActArguments(arguments) {
    group = rows ? group_values / std::max<int64_t>(1, channels) : plane_values / std::max<int64_t>(1, plane);
    if (by_image && !rows) group = 1;
    group = std::max<int64_t>(1, group);
    divided = !rows ? samples : by_image ? plane : samples * plane;
    pieces = (divided + group - 1) / group;
  }

  // Planes: item = piece * channels + channel. Rows: item = piece, or sample * pieces + piece, of all channels.
  int64_t items() const { return !rows ? pieces * channels : by_image ? samples * pieces : pieces; }
  int64_t partials() const { return rows ? items() * channels : items(); }
  int64_t block_rows() const { return std::clamp<int64_t>(block_values / std::max<int64_t>(1, channels), 4, 32); }
  Chunks chunks() const { return Chunks(items(), group * (rows ? channels : plane)); }
};

KDKERNELS_KERNEL(void, batch_norm_act_forward, (const BatchNormActCall& call, int64_t begin, int64_t end),
                 (call, begin, end))
KDKERNELS_KERNEL(void, batch_norm_act_backward, (const BatchNormActCall& call, int64_t begin, int64_t end),
                 (call, begin, end))

}  // namespace kdkernels::cpu
