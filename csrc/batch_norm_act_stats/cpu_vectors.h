// The fused BatchNorm layer at a vector of numbers, and sums of vectors.
#pragma once

#include "batch_norm_act_stats/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

using math::ActivationKind;

// Reads and writes `count` numbers, which are those of a whole vector if `whole`.
template <bool whole, class V, class T>
KDKERNELS_INLINE V read(const T* source, int64_t count, Scalar<V> fill = 0) {
  if constexpr (whole) return load<V>(source);
  return load_part<V>(source, count, fill);
}
template <bool whole, class V, class T>
KDKERNELS_INLINE void write(T* destination, V value, int64_t count) {
  if constexpr (whole) {
    store(destination, value);
  } else {
    store_part(destination, value, count);
  }
}

template <class V>
KDKERNELS_INLINE V load_at(const void* numbers, int64_t i) {
  return load<V>(static_cast<const Scalar<V>*>(numbers) + i);
}
template <class V>
KDKERNELS_INLINE V splat_at(const void* numbers, int64_t i) {
  return splat<V>(static_cast<const Scalar<V>*>(numbers)[i]);
}

// Sums of distances and squared distances from a center
template <class V>
struct Sums {
  V distances{}, squares{};

  KDKERNELS_INLINE void add(V distance) {
    distances = distances + distance;
    squares = squares + distance * distance;
  }
  KDKERNELS_INLINE void add(const Sums& other) {
    distances = distances + other.distances;
    squares = squares + other.squares;
  }
};

// A sum of squares that rounding may have made negative
KDKERNELS_INLINE double not_negative(double squares) { return squares < 0 ? 0 : squares; }

KDKERNELS_INLINE math::Moments<double> moments_of(double center, double count, double distances, double squares) {
  return {count, center + distances / count, not_negative(squares - distances * distances / count)};
}

// Adds the first lanes of a vector to numbers in double.
template <class V>
KDKERNELS_INLINE void add_lanes(double* to, V values, int64_t valid = lanes<V>) {
  Scalar<V> numbers[lanes<V>];
  store(numbers, values);
  for (int64_t l = 0; l < valid; ++l) to[l] += double(numbers[l]);
}
template <class V>
KDKERNELS_INLINE double exact_sum(V values) {
  double numbers[lanes<V>] = {}, sum = 0;
  add_lanes(numbers, values);
  for (int l = 0; l < lanes<V>; ++l) sum += numbers[l];
  return sum;
}

// Neighbouring numbers of the tensors of a forward: a plane, or some channels of a row
template <ActivationKind kind, class V, class T>
struct Forward {
  const T *x, *residual;
  T* out;

  // Computes the output of a vector of numbers and returns them.
  template <bool whole>
  KDKERNELS_INLINE V vector(int64_t i, int64_t count, V scale, V shift, const math::ActivationOf<kind, V>& activation,
                            Scalar<V> fill = 0) const {
    const V value = read<whole, V>(x + i, count, fill);
    V sum = value * scale + shift;
    if (residual != nullptr) sum = sum + read<whole, V>(residual + i, count);
    write<whole>(out + i, activation.at(sum), count);
    return value;
  }
};

// The coefficients of the gradient, for one channel or some
template <class V>
struct Coefficients {
  V scale, shift, mean, constant, slope;
};

// Neighbouring numbers of the tensors of a backward
template <ActivationKind kind, class V, class T>
struct Backward {
  const T *x, *y, *grad;  // y: the output, if there is a residual
  T *by_input, *by_residual;
  bool of_statistics;  // whether the statistics have a gradient; 0 times a NaN is not 0

  template <bool whole>
  KDKERNELS_INLINE void vector(int64_t i, int64_t count, const Coefficients<V>& c,
                               const math::ActivationOf<kind, V>& activation) const {
    const V value = read<whole, V>(x + i, count);
    V result{};
    if (of_statistics) result = math::statistics_gradient(value, c.mean, c.constant, c.slope);
    if (grad != nullptr) {
      const V at = y == nullptr ? value * c.scale + c.shift : read<whole, V>(y + i, count);
      const V through = activation.through(at, read<whole, V>(grad + i, count));
      if (by_residual != nullptr) write<whole>(by_residual + i, through, count);
      result = result + through * c.scale;
    }
    write<whole>(by_input + i, result, count);
  }
};

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
