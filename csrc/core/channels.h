// Tensors [N, C, ...] as kernels see them. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace kdkernels {

// A tensor [N, C, ...] as rows of channels (channels_last, and 2-d) or as planes of one channel each
struct ChannelTensor {
  void* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0;  // of planes
  int64_t row_stride = 0;                         // of rows
};

// A tensor that a kernel reads, and its sizes
struct ChannelInput {
  Storage storage = Storage::float32;
  bool rows = false;                             // else planes
  int64_t samples = 0, channels = 0, plane = 0;  // plane: values of one sample and channel
  ChannelTensor input;
};

template <class T>
KDKERNELS_INLINE T* at(const ChannelTensor& tensor, int64_t offset) {
  return tensor.data == nullptr ? nullptr : static_cast<T*>(tensor.data) + offset;
}
KDKERNELS_INLINE int64_t plane_offset(const ChannelTensor& tensor, int64_t sample, int64_t channel) {
  return sample * tensor.sample_stride + channel * tensor.channel_stride;
}

}  // namespace kdkernels
