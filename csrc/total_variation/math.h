// Differences of neighbouring pixels, and what a total variation makes of them.
#pragma once

#include "core/value.h"

namespace kdkernels::math {

// -1, 0 or 1; NaN stays NaN
template <class V>
KDKERNELS_INLINE V sign(V x) {
  return select(x > Scalar<V>(0), splat<V>(1), select(x < Scalar<V>(0), splat<V>(-1), x));
}

// The four differences of a pixel a with its right, lower and lower right neighbour: right, down, and the diagonals.
template <class V>
struct Differences {
  V right, down, rising, falling;

  KDKERNELS_INLINE Differences(V a, V right_pixel, V lower, V lower_right)
      : right(a - right_pixel), down(a - lower), rising(lower - right_pixel), falling(a - lower_right) {}
};

// The derivative by a pixel of linear / 2 * d^2 + absolute * |d|, d = pixel - neighbour. NaN stays NaN by the first
// term.
template <class V>
KDKERNELS_INLINE V difference_gradient(V difference, Scalar<V> linear, Scalar<V> absolute) {
  V slope = flip_sign(splat<V>(absolute), difference);
  return difference * linear + select(difference == Scalar<V>(0), V{}, slope);
}

}  // namespace kdkernels::math
