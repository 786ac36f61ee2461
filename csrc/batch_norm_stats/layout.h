// How the channels of an activation lie in memory, and what is computed of each
#pragma once

#include <optional>
#include <string>

#include "batch_norm_stats/channel_tensor.h"
#include "batch_norm_stats/math.h"
#include "core/dispatch.h"

namespace kdkernels {

// The stride of dimensions that are stepped through evenly, all but `skipped`; nothing if they are not.
inline std::optional<int64_t> even_stride(const Tensor& tensor, int64_t first, int64_t skipped) {
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    if (d == skipped || tensor.size(d) == 1) continue;
    if (!stride) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != expected) {
      return std::nullopt;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride ? *stride : 1;
}

inline std::optional<ChannelTensor> as_rows(const Tensor& tensor) {
  const auto stride = even_stride(tensor, 0, 1);
  if (!stride || (tensor.stride(1) != 1 && tensor.size(1) > 1)) return std::nullopt;
  return ChannelTensor{const_cast<void*>(tensor.const_data_ptr()), 0, 0, *stride};
}

inline std::optional<ChannelTensor> as_planes(const Tensor& tensor) {
  const auto stride = even_stride(tensor, 2, -1);
  if (!stride || *stride != 1) return std::nullopt;
  return ChannelTensor{const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), 0};
}

inline std::optional<ChannelTensor> as_layout(const Tensor& tensor, bool rows) {
  return rows ? as_rows(tensor) : as_planes(tensor);
}

// Whether to take a tensor as rows: where channels are neighbours in memory, or planes of one value.
inline bool prefers_rows(const Tensor& tensor) {
  const bool neighbours = tensor.stride(1) == 1 && tensor.size(1) > 1;
  return as_rows(tensor) && (neighbours || tensor.numel() == tensor.size(0) * tensor.size(1));
}

inline math::StatDistance stat_distance(const std::string& mode, const std::string& moment, int64_t channels) {
  const math::StatMode stat_mode = mode == "l2"        ? math::StatMode::l2
                                   : mode == "squared" ? math::StatMode::squared
                                                       : math::StatMode::gaussian_kl;
  return {stat_mode, moment == "std", double(channels)};
}

}  // namespace kdkernels
