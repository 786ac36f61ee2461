// From torch's tensors to the arguments of a call: what the bindings of both devices share.
#pragma once

#include <vector>

#include "core/dispatch.h"
#include "total_variation/arguments.h"

namespace kdkernels {

enum class ImageLayout { planes, channels_last, none };

// Rows that lie in memory without gaps: of one channel, or of pixels with their channels side by side
inline ImageLayout layout_of(const Tensor& image) {
  const int64_t channels = image.size(1), width = image.size(3);
  if (channels > 1 && image.stride(1) == 1 && (width == 1 || image.stride(3) == channels)) {
    return ImageLayout::channels_last;
  }
  return width == 1 || image.stride(3) == 1 ? ImageLayout::planes : ImageLayout::none;
}

inline ImageTensor describe(const Tensor& image) {
  return {const_cast<void*>(image.const_data_ptr()), image.stride(0), image.stride(1), image.stride(2)};
}

// The image, or a contiguous copy where its rows have gaps
inline Tensor readable(const Tensor& image) {
  return layout_of(image) == ImageLayout::none ? torch::stable::contiguous(image) : image;
}

// The arguments of a call on images [B, C, H, W] whose layout is not `none`
inline ImageArguments arguments_of(const Tensor& image) {
  ImageArguments arguments;
  arguments.storage = storage_of(image);
  arguments.images = image.size(0);
  arguments.rows = image.size(2);
  const bool channels_last = layout_of(image) == ImageLayout::channels_last;
  arguments.step = channels_last ? image.size(1) : 1;
  arguments.planes = channels_last ? 1 : image.size(1);
  arguments.length = image.size(3) * arguments.step;
  arguments.input = describe(image);
  return arguments;
}

// Images, and their gradient in the same layout
inline InputAndOutput with_gradient(const Tensor& image, const Tensor& gradient) {
  const ImageLayout layout = layout_of(image);
  return {image, gradient, layout != ImageLayout::none && layout_of(gradient) == layout};
}
inline ImageArguments arguments_of(const InputAndOutput& images) {
  ImageArguments arguments = arguments_of(images.input);
  arguments.output = describe(images.output);
  return arguments;
}

// A few numbers, in the dtype that results have
inline Tensor new_result(const Tensor& image, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(image, shape, compute_dtype(image));
}

}  // namespace kdkernels
