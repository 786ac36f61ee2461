// The distance of the mean and variance of channels from the running statistics of a BatchNorm layer.
#pragma once

#include <cmath>

#include "core/moments.h"

namespace kdkernels::math {

enum class StatMode { l2, l1, squared, gaussian_kl };

// The distance of a layer's statistics from its running statistics. First `measure` adds up every channel; the value
// and the gradients follow from the sums. The spread that all modes but gaussian_kl compare is the variance or its
// root.
struct StatDistance {
  StatMode mode;
  bool root, sum;  // sum: over the channels, else their mean
  double mean_weight, spread_weight;
  double channels = 0;

  struct Channel {
    double mean, variance, running_mean, running_variance;
  };
  struct Sums {
    double means = 0, spreads = 0;
  };
  struct Gradients {
    double mean, variance, running_mean, running_variance;
  };

  static constexpr double eps = 1e-8;  // added to both variances of gaussian_kl

  KDKERNELS_INLINE double divisor() const { return sum || channels == 0 ? 1 : channels; }
  KDKERNELS_INLINE double spread(double variance) const { return root ? std::sqrt(variance) : variance; }
  // d spread / d variance, 0 where the root has no derivative
  KDKERNELS_INLINE double slope(double spread) const { return !root ? 1 : spread == 0 ? 0 : 0.5 / spread; }

  KDKERNELS_INLINE void measure(const Channel& c, Sums& sums) const {
    const double means = c.mean - c.running_mean;
    if (mode == StatMode::gaussian_kl) {
      // ln(sigma / running sigma) - (1 - (running variance + distance^2) / variance) / 2
      const double v = c.variance + eps, r = c.running_variance + eps;
      sums.means += 0.5 * (std::log(v / r) + ((r - v) + means * means) / v);
      return;
    }
    const double spreads = spread(c.variance) - spread(c.running_variance);
    const bool absolute = mode == StatMode::l1;
    sums.means += absolute ? std::fabs(means) : means * means;
    sums.spreads += absolute ? std::fabs(spreads) : spreads * spreads;
  }

  KDKERNELS_INLINE double value(const Sums& sums) const {
    if (mode == StatMode::l2) return mean_weight * std::sqrt(sums.means) + spread_weight * std::sqrt(sums.spreads);
    return (mean_weight * sums.means + spread_weight * sums.spreads) / divisor();
  }

  KDKERNELS_INLINE Gradients gradients(const Channel& c, const Sums& sums) const {
    const double means = c.mean - c.running_mean;
    if (mode == StatMode::gaussian_kl) {
      const double v = c.variance + eps, r = c.running_variance + eps;
      const double by_mean = means / (v * divisor());
      return {by_mean, 0.5 * ((v - r) - means * means) / (v * v * divisor()), -by_mean,
              0.5 * (r - v) / (v * r * divisor())};
    }
    const double s = spread(c.variance), r = spread(c.running_variance);
    const double by_mean = mean_weight * slope_of_sum(means, sums.means);
    const double by_spread = spread_weight * slope_of_sum(s - r, sums.spreads);
    return {by_mean, by_spread * slope(s), -by_mean, -by_spread * slope(r)};
  }

 private:
  // The derivative of l2, l1 or squared by the difference of one channel; 0 at a norm or a difference of 0
  KDKERNELS_INLINE double slope_of_sum(double difference, double total) const {
    if (mode == StatMode::squared) return 2 * difference / divisor();
    if (mode == StatMode::l1) return double((difference > 0) - (difference < 0)) / divisor();
    const double norm = std::sqrt(total);
    return norm == 0 ? 0 : difference / norm;
  }
};

}  // namespace kdkernels::math
