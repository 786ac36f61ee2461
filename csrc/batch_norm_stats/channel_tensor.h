// An activation as kernels see it. No torch, no CUDA: they include this.
#pragma once

#include <cstdint>

namespace kdkernels {

// A tensor [N, C, ...] as rows of channels (channels_last, and 2-d) or as planes of one channel each.
struct ChannelTensor {
  void* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0;  // of planes; rows are row_stride apart
  int64_t row_stride = 0;
};

}  // namespace kdkernels
