// How the CPU cuts the work of the image priors, by size alone, and the kernels that do it. No torch.
#pragma once

#include <algorithm>

#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"
#include "total_variation/arguments.h"

namespace kdkernels::cpu {

constexpr int64_t block_numbers = 8192;  // most numbers of an item with several rows

// An item is a block of neighbouring rows of a plane.
struct ImageCall : ImageArguments {
  int64_t block, blocks;           // rows of an item, items of a plane
  bool absolute, squares, pixels;  // which sums, or which parts of the gradient, are wanted

  DifferenceSums* partial = nullptr;                                   // by item
  const math::DifferenceCoefficients<double>* coefficients = nullptr;  // by image

  explicit ImageCall(const ImageArguments& arguments)
      : ImageArguments(arguments), absolute(uses_absolute()), squares(uses_squares()), pixels(uses_pixels()) {
    block = std::clamp<int64_t>(block_numbers / std::max<int64_t>(1, length), 1, std::max<int64_t>(1, rows));
    blocks = length == 0 ? 0 : (rows + block - 1) / block;
  }

  int64_t items() const { return images * planes * blocks; }
  Chunks chunks() const { return {items(), block * length}; }
};

KDKERNELS_KERNEL(void, difference_sums, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, difference_gradients, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, isotropic_sums, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, isotropic_gradients, (const ImageCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
