// What the kernels of the image priors are asked to do, in plain numbers and pointers.
#pragma once

#include "capability.h"
#include "storage.h"

namespace kdkernels::cpu {

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

struct ImageCall {
  Storage storage = Storage::float32;
  int64_t images = 0, planes = 0, rows = 0, length = 0, step = 1;  // length: numbers in a row
  int64_t block = 1, blocks = 0;                                   // rows of an item, items of a plane
  int directions = 4;
  bool absolute = true, squares = true, pixels = true;  // which sums, or which parts of the gradient
  double eps = 0;                                       // of the isotropic variation
  ImageTensor input, output;

  DifferenceSums* partial = nullptr;  // by item
  DifferenceCoefficients coefficients;
  const double *image_scale = nullptr, *pixel_scale = nullptr;  // by image

  int64_t items() const { return images * planes * blocks; }
};

KDKERNELS_KERNEL(void, difference_sums, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, difference_gradients, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, isotropic_sums, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, isotropic_gradients, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
