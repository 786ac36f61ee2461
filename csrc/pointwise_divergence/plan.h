// How the CPU cuts the work of a pointwise divergence, by size alone, and the kernels that do it. No torch.
#pragma once

#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"
#include "pointwise_divergence/arguments.h"

namespace kdkernels::cpu {

constexpr int64_t piece_numbers = 512;  // most numbers of an item: those of every operand stay in the first-level cache

// An item is a piece of one row, the inner dimension at one index into the others.
struct PointwiseCall : PointwiseLayout, PointwiseArguments {
  int64_t rows = 1, length = 1, pieces = 1;  // rows; numbers and pieces of a row
  double normalizer = 1;                     // the loss and its gradient are multiplied by it
  bool sum_temperature = false;              // whether the derivatives by the temperature are summed

  // The layout must have been simplified.
  PointwiseCall(const PointwiseLayout& layout, const PointwiseArguments& arguments)
      : PointwiseLayout(layout), PointwiseArguments(arguments) {
    for (int d = 0; d < dims - 1; ++d) rows *= size[d];
    if (dims > 0) length = size[dims - 1];
    pieces = (length + piece_numbers - 1) / piece_numbers;
  }

  Chunks chunks() const { return {rows * pieces, 4 * std::min(length, piece_numbers)}; }
};

// Both kernels take items begin to end. The first returns the sum of the elements, not yet normalized, and writes them
// if there is a left result; the second writes the gradients that there are results for and returns the sum of the
// derivatives by the temperature if asked.
KDKERNELS_KERNEL(double, pointwise_losses, (const PointwiseCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(double, pointwise_gradients, (const PointwiseCall& call, int64_t begin, int64_t end),
                 (call, begin, end))

// Weights that lie next to each other
struct ElementWeights {
  const void* data;
  bool is_double;
  int64_t count;

  Chunks chunks() const { return {count, 1}; }
};

// The sum of the weights begin to end; not finite if one of them is negative or not finite.
KDKERNELS_KERNEL(double, sum_of_element_weights, (const ElementWeights& weights, int64_t begin, int64_t end),
                 (weights, begin, end))

}  // namespace kdkernels::cpu
