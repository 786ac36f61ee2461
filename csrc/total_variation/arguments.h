// What a call of the image priors asks for, in plain numbers: one description for both devices. No torch, no CUDA:
// kernels include this.
#pragma once

#include <cstdint>
#include <string>

#include "core/storage.h"
#include "total_variation/math.h"

namespace kdkernels {

using math::DifferenceSums;
using math::Losses;

// An image as planes of rows: a plane is a channel, or the whole image where channels are neighbours in memory.
struct ImageTensor {
  void* data = nullptr;
  int64_t image_stride = 0, plane_stride = 0, row_stride = 0;
};

struct ImageArguments {
  Storage storage = Storage::float32;
  // `length` numbers in a row, the pixels of a channel `step` numbers apart
  int64_t images = 0, planes = 0, rows = 0, length = 0, step = 1;
  ImageTensor input, output;
  Losses losses = Losses::priors;
  int directions = 4;
  double eps = 0;               // of the isotropic variation
  double weight[4] = {};        // of the sums of each direction
  bool average_images = false;  // the loss is a mean over the images
  bool loss_by_image = false;   // the loss is one number per image

  // Which sums the losses are made of
  KDKERNELS_INLINE bool uses_absolute() const { return losses == Losses::priors || losses == Losses::l1; }
  KDKERNELS_INLINE bool uses_squares() const { return losses != Losses::l1; }
  KDKERNELS_INLINE bool uses_pixels() const { return losses == Losses::priors; }

  // The weights of means over the pairs of neighbours in each direction
  void average_pairs() {
    const double all = double(images * planes * step), h = double(rows), w = double(length / step);
    const double h1 = h > 1 ? h - 1 : 0, w1 = w > 1 ? w - 1 : 0;
    const double pairs[4] = {all * h * w1, all * h1 * w, all * h1 * w1, all * h1 * w1};
    for (int k = 0; k < 4; ++k) weight[k] = math::inverse(pairs[k]);
  }

  // The options of a total variation. Its mean is over the images for "l2" and "isotropic", else over the pairs.
  void set_options(const std::string& norm_type, int64_t number_of_directions, double epsilon,
                   const std::string& reduction) {
    losses = norm_type == "l1"           ? Losses::l1
             : norm_type == "l2"         ? Losses::l2
             : norm_type == "l2_squared" ? Losses::l2_squared
                                         : Losses::isotropic;
    directions = int(number_of_directions);
    eps = epsilon;
    loss_by_image = reduction == "none";
    average_images = reduction == "mean" && (losses == Losses::l2 || losses == Losses::isotropic);
    for (double& one : weight) one = 1;
    if (reduction == "mean" && !average_images) average_pairs();
  }
};

}  // namespace kdkernels
