// Whether a tensor [N, C, ...] lies in memory as rows of channels or as planes of one channel each.
#pragma once

#include <optional>

#include "core/channels.h"
#include "core/dispatch.h"

namespace kdkernels {

// The stride of the dimensions from `first` on, without `skipped`, if they are stepped through evenly
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

// Whether to take a tensor as rows: where channels are neighbours in memory, or planes have one value.
inline bool prefers_rows(const Tensor& tensor) {
  const bool neighbours = tensor.stride(1) == 1 && tensor.size(1) > 1;
  return as_rows(tensor) && (neighbours || tensor.numel() == tensor.size(0) * tensor.size(1));
}

// The tensor, or a contiguous copy where it can be taken neither as rows nor as planes
inline Tensor readable(const Tensor& tensor) {
  return as_layout(tensor, prefers_rows(tensor)) ? tensor : torch::stable::contiguous(tensor);
}

inline ChannelInput channel_input(const Tensor& readable) {
  const bool rows = prefers_rows(readable);
  int64_t plane = 1;
  for (int64_t d = 2; d < readable.dim(); ++d) plane *= readable.size(d);
  return {storage_of(readable), rows, readable.size(0), readable.size(1), plane, *as_layout(readable, rows)};
}

}  // namespace kdkernels
