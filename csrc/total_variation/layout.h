// How images lie in memory, and what their sums are multiplied with
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "core/dispatch.h"
#include "total_variation/image_tensor.h"

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

inline Tensor readable(const Tensor& image) {
  return layout_of(image) == ImageLayout::none ? torch::stable::contiguous(image) : image;
}

// Pairs of neighbours in all images, by direction
inline std::array<double, 4> pairs(const Tensor& image) {
  const double planes = double(image.size(0) * image.size(1));
  const double h = double(image.size(2)), w = double(image.size(3));
  const double h1 = std::max(h - 1, 0.0), w1 = std::max(w - 1, 0.0);
  return {planes * h * w1, planes * h1 * w, planes * h1 * w1, planes * h1 * w1};
}

inline double inverse(double value) { return value > 0 ? 1 / value : 0; }

// The mean is over the images, or over the pairs of each direction.
inline bool averages_images(const std::string& norm_type, const std::string& reduction) {
  return reduction == "mean" && (norm_type == "l2" || norm_type == "isotropic");
}

// What the sums of a direction are multiplied by
inline std::array<double, 4> weights(const Tensor& image, const std::string& norm_type, const std::string& reduction) {
  if (reduction != "mean" || averages_images(norm_type, reduction)) return {1, 1, 1, 1};
  auto weight = pairs(image);
  for (double& w : weight) w = inverse(w);
  return weight;
}

}  // namespace kdkernels
