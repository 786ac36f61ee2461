// The activations that follow a BatchNorm layer.
#pragma once

#include "core/fast_exp.h"
#include "core/moments.h"

namespace kdkernels::math {

// Kernels are compiled for each kind. No activation is a leaky ReLU of slope 1.
enum class ActivationKind { clamp, leaky_relu, silu, hardswish };

struct Activation {
  ActivationKind kind = ActivationKind::leaky_relu;
  double low = 0, high = 0;   // of clamp: relu and relu6
  double negative_slope = 1;  // of leaky_relu
};

template <class V>
KDKERNELS_INLINE V sigmoid(V x) {
  const V one = splat<V>(1), power = exp_nonpositive(V{} - absolute(x));
  return select(x >= V{}, one, power) / (one + power);
}

template <ActivationKind kind, class V>
struct ActivationOf {
  V low, high, negative_slope;

  KDKERNELS_INLINE explicit ActivationOf(const Activation& activation)
      : low(splat<V>(Scalar<V>(activation.low))),
        high(splat<V>(Scalar<V>(activation.high))),
        negative_slope(splat<V>(Scalar<V>(activation.negative_slope))) {}

  // Written such that NaN passes
  KDKERNELS_INLINE V at(V x) const {
    if constexpr (kind == ActivationKind::clamp) {
      return minimum(high, maximum(low, x));
    } else if constexpr (kind == ActivationKind::leaky_relu) {
      return select(x > V{}, x, x * negative_slope);
    } else if constexpr (kind == ActivationKind::silu) {
      return x * sigmoid(x);
    } else {
      return x * minimum(splat<V>(6), maximum(V{}, x + Scalar<V>(3))) * Scalar<V>(1.0 / 6);
    }
  }

  // A gradient times the derivative at x. The output of clamp and leaky_relu may stand for x: it is on the same side of
  // every kink.
  KDKERNELS_INLINE V through(V x, V grad) const {
    if constexpr (kind == ActivationKind::clamp) {
      return select(x <= low, V{}, select(x >= high, V{}, grad));
    } else if constexpr (kind == ActivationKind::leaky_relu) {
      return select(x > V{}, grad, grad * negative_slope);
    } else if constexpr (kind == ActivationKind::silu) {
      const V s = sigmoid(x), one = splat<V>(1);
      return grad * (s * (one + x * (one - s)));
    } else {
      const V inside = grad * (x * Scalar<V>(1.0 / 3) + Scalar<V>(0.5));
      return select(x <= splat<V>(-3), V{}, select(x >= splat<V>(3), grad, inside));
    }
  }
};

// Normalization by running statistics and the affine function after it, as scale * x + shift
struct Affine {
  double scale, shift;

  KDKERNELS_INLINE Affine(double mean, double variance, double weight, double bias, double eps)
      : scale(weight / std::sqrt(variance + eps)), shift(bias - mean * scale) {}
};

}  // namespace kdkernels::math
