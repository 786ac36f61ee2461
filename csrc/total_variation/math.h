// Differences of neighbouring pixels, and what a total variation and the image priors make of them.
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

// sqrt(dx^2 + dy^2 + eps) of a pixel. A difference without a neighbour is 0; a pixel without any (`present` is false)
// has no term. A single number is guarded by a branch, which takes fewer registers of a GPU than a selection.
template <class V>
struct IsotropicTerm {
  V dx, dy, length{};

  template <class Mask>
  KDKERNELS_INLINE IsotropicTerm(V dx, V dy, Mask present, Scalar<V> eps) : dx(dx), dy(dy) {
    const auto norm = [&] { return square_root(dx * dx + dy * dy + eps); };
    if constexpr (lanes<V> == 1) {
      if (present) length = norm();
    } else {
      length = select(present, norm(), V{});
    }
  }

  // d length / d difference, 0 at length 0
  KDKERNELS_INLINE V slope(V difference) const {
    const auto positive = length > Scalar<V>(0);
    if constexpr (lanes<V> == 1) {
      return positive ? difference / length : V(0);
    } else {
      return select(positive, difference / select(positive, length, splat<V>(1)), V{});
    }
  }
};

// What the sums of the differences become: the three priors of DeepInversion, or a total variation
enum class Losses { priors, l1, l2, l2_squared, isotropic };

// Sums over some rows: |d| and d^2 by direction, x^2, and the isotropic variation
struct DifferenceSums {
  double absolute[4] = {}, squares[4] = {};
  double pixels = 0;
  double isotropic = 0;

  KDKERNELS_INLINE void add(const DifferenceSums& other) {
    for (int k = 0; k < 4; ++k) {
      absolute[k] += other.absolute[k];
      squares[k] += other.squares[k];
    }
    pixels += other.pixels;
    isotropic += other.isotropic;
  }

  // The total variation of an image, with a weight for each direction
  KDKERNELS_INLINE double variation(Losses losses, int directions, const double (&weight)[4]) const {
    double value = isotropic;
    for (int k = 0; k < directions && losses != Losses::isotropic; ++k) {
      value += weight[k] * (losses == Losses::l1 ? absolute[k] : squares[k]);
    }
    return losses == Losses::l2 ? std::sqrt(value) : value;
  }
};

// What the gradient multiplies: the differences of an image and their signs by direction, and its pixels
template <class S>
struct DifferenceCoefficients {
  S linear[4] = {}, absolute[4] = {}, pixel = 0;

  // The coefficients of the priors, from the incoming gradients and the norms of the differences and of the image
  template <class Norm>
  KDKERNELS_INLINE void set_priors(double by_l1, double by_l2, double by_norm, const double (&weight)[4],
                                   const Norm& norm_of_differences, double norm_of_image, double images) {
    for (int k = 0; k < 4; ++k) {
      absolute[k] = S(by_l1 * weight[k]);
      linear[k] = S(by_l2 * inverse(norm_of_differences(k)));
    }
    pixel = S(by_norm * inverse(norm_of_image) / images);
  }

  // The coefficients of a variation, from the incoming gradient of the image, for l2 divided by its norm
  KDKERNELS_INLINE void set_variation(Losses losses, double scale, const double (&weight)[4]) {
    for (int k = 0; k < 4; ++k) {
      absolute[k] = S(scale * weight[k]);
      linear[k] = S(losses == Losses::l2_squared ? 2 * scale * weight[k] : scale);
    }
  }
};

// What a difference of two neighbours in a volume counts as: |d|, d^2, Huber's loss, or a part of the length of a
// gradient
enum class PairNorm { absolute, square, huber, isotropic };

// d^2 / 2 up to the threshold, threshold * (|d| - threshold / 2) beyond; NaN stays NaN
template <class V>
KDKERNELS_INLINE V huber(V d, Scalar<V> threshold) {
  const V magnitude = absolute(d);
  return select(magnitude > threshold, threshold * (magnitude - Scalar<V>(0.5) * threshold), Scalar<V>(0.5) * d * d);
}

template <PairNorm norm, class V>
KDKERNELS_INLINE V pair_term(V difference, Scalar<V> threshold) {
  if constexpr (norm == PairNorm::absolute) {
    return absolute(difference);
  } else if constexpr (norm == PairNorm::huber) {
    return huber(difference, threshold);
  } else {
    return difference * difference;
  }
}

// The derivative of a term, that of the square divided by 2; it is odd in the difference.
template <PairNorm norm, class V>
KDKERNELS_INLINE V pair_slope(V difference, Scalar<V> threshold) {
  if constexpr (norm == PairNorm::absolute) {
    return sign(difference);
  } else if constexpr (norm == PairNorm::huber) {
    return select(difference > threshold, splat<V>(threshold),
                  select(difference < -threshold, splat<V>(-threshold), difference));
  } else {
    return difference;
  }
}

}  // namespace kdkernels::math
