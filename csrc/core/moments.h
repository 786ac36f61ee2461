// The mean and variance of some values, and their gradient.
#pragma once

#include "core/value.h"

namespace kdkernels::math {

// The count of some values, their mean, and the sum of their squared distances from it. Merging two moments is exact up
// to rounding, however far apart their means are.
template <class Real>
struct Moments {
  Real count = 0, mean = 0, squares = 0;

  // From sums of distances and squared distances from the rounded mean
  KDKERNELS_INLINE static Moments around(Real mean, Real count, Real sum, Real sum_of_squares) {
    return {count, mean, sum_of_squares - sum * sum / count};
  }

  KDKERNELS_INLINE void merge(const Moments& other) {
    const Real total = count + other.count;
    if (total == 0) return;
    const Real distance = other.mean - mean, share = other.count / total;
    mean += distance * share;
    squares += other.squares + distance * distance * count * share;
    count = total;
  }

  KDKERNELS_INLINE Real variance(bool unbiased) const { return squares / (unbiased ? count - 1 : count); }
};

// The gradient by a value x of a channel is (x - mean) * slope + constant = dmean / n + 2 dvar (x - mean) / n, with n -
// 1 in the second term if unbiased. The constant also has the error that all x - mean of a channel share, that of the
// mean.
template <class Real>
struct StatisticsGradient {
  Real slope, constant;

  KDKERNELS_INLINE StatisticsGradient(Real grad_mean, Real grad_variance, Real mean_error, Real count, Real divisor)
      : slope(grad_variance * Real(2) / divisor), constant(grad_mean / count - slope * mean_error) {}
};
template <class V>
KDKERNELS_INLINE V statistics_gradient(V x, V mean, V constant, V slope) {
  return (x - mean) * slope + constant;
}

}  // namespace kdkernels::math
