// What the kernels of the image priors are asked to do, in plain numbers and pointers.
#pragma once

#include "core/cpu/capability.h"
#include "core/cpu/storage.h"
#include "total_variation/image_tensor.h"

namespace kdkernels::cpu {

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
