// How the CPU cuts the work of the fused BatchNorm layer, by size alone, and the kernels that do it. No torch.
#pragma once

#include <algorithm>
#include <numeric>

#include "batch_norm_act_stats/arguments.h"
#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"

namespace kdkernels::cpu {

struct BatchNormActCall : BatchNormActArguments {
  static constexpr int64_t plane_values = 512;    // planes of a channel are taken together up to this many values,
  static constexpr int64_t group_values = 32768;  // and rows of all channels up to this many;
  static constexpr int64_t block_values = 4096;   // the first-level cache holds this many
  static constexpr int64_t padding = 64;          // numbers behind the channels, so that whole vectors can be read
  static constexpr int64_t vector_values = 16;    // of the widest vectors

  int64_t copies;   // rows that are seen as one wide row, so that it consists of whole vectors
  int64_t group;    // samples, or rows, that one item takes together
  int64_t divided;  // samples, or rows, that the pieces divide
  int64_t pieces;   // that the samples or rows are divided into; by image, those of each sample

  // By channel of a wide row, in double if the storage is
  const void *scale = nullptr, *shift = nullptr;
  double* partial = nullptr;  // forward: see means_of
  // Backward, by channel of a wide row, or by sample and channel of a wide row
  const void *mean = nullptr, *constant = nullptr, *slope = nullptr;
  bool of_statistics = true;  // whether they are needed

  explicit BatchNormActCall(const BatchNormActArguments& arguments) : BatchNormActArguments(arguments) {
    copies = rows && is_dense() ? vector_values / std::gcd(channels, vector_values) : 1;
    if (wide() > 1024) copies = 1;
    group = rows ? group_values / std::max<int64_t>(1, wide()) * copies : plane_values / std::max<int64_t>(1, plane);
    if (by_image && !rows) group = 1;
    group = std::max<int64_t>(copies, group);
    divided = !rows ? samples : by_image ? plane : samples * plane;
    pieces = (divided + group - 1) / group;
  }

  // Numbers in a wide row
  int64_t wide() const { return channels * copies; }
  int64_t block_rows() const {
    const int64_t most = wide() <= vector_values ? 128 : wide() <= 2 * vector_values ? 64 : 32;
    return std::clamp<int64_t>(block_values / std::max<int64_t>(1, wide()), 4, most);
  }

  // Planes: item = piece * channels + channel, where by image a piece is a sample. Rows: item = piece, or sample *
  // pieces + piece, of all channels.
  int64_t items() const { return !rows ? pieces * channels : by_image ? samples * pieces : pieces; }
  Chunks chunks() const { return Chunks(items(), group * (rows ? channels : plane)); }

  // For each piece (of each sample), means of the channels and sums of squared distances from them
  int64_t parts() const { return rows ? items() : pieces; }
  double* means_of(int64_t part) const { return partial + 2 * part * channels; }
  double* squares_of(int64_t part) const { return means_of(part) + channels; }
  // Values of a channel in a part
  int64_t count_of(int64_t part) const {
    const int64_t piece = rows && by_image ? part % pieces : part;
    return std::min(group, divided - piece * group) * (rows ? 1 : plane);
  }

 private:
  bool is_dense() const {
    for (const ChannelTensor& tensor : {input, output, residual, grad_output, grad_input, grad_residual}) {
      if (tensor.data != nullptr && tensor.row_stride != channels) return false;
    }
    return true;
  }
};

KDKERNELS_KERNEL(void, batch_norm_act_forward, (const BatchNormActCall& call, int64_t begin, int64_t end),
                 (call, begin, end))
KDKERNELS_KERNEL(void, batch_norm_act_backward, (const BatchNormActCall& call, int64_t begin, int64_t end),
                 (call, begin, end))

}  // namespace kdkernels::cpu
