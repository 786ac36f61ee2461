// Images as kernels see them, and what is summed over their differences. No torch, no CUDA: they include this.
#pragma once

#include <cstdint>

namespace kdkernels {

// An image as planes of rows: a plane is a channel, or the whole image where channels are neighbours in memory;
// pixels of a row are `step` numbers apart.
struct ImageTensor {
  void* data = nullptr;
  int64_t image_stride = 0, plane_stride = 0, row_stride = 0;
};

// Sums over a block of rows: of |d| and d^2 by direction, of x^2, and the isotropic variation
struct DifferenceSums {
  double absolute[4] = {}, squares[4] = {};
  double pixels = 0;
  double isotropic = 0;
};

// What the gradient multiplies: differences and their signs by direction, and the pixel itself
struct DifferenceCoefficients {
  double linear[4] = {}, absolute[4] = {};
};

}  // namespace kdkernels
