// The numbers that formulas compute with: a float, a double, or a vector of them. A formula written for a type V is the
// same code for one CUDA thread (V = float) and for the lanes of a CPU vector register (V = 16 floats).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define KDKERNELS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KDKERNELS_INLINE inline __attribute__((always_inline))
#else
#define KDKERNELS_INLINE inline
#endif

namespace kdkernels::math {

// Vectors are those of the vector extension of GCC and Clang: comparing two of them gives a mask of signed integers as
// wide as the lanes, which is also the type of their bit patterns.
template <class V>
struct Traits {
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(V()[0])>>;
  using Bits = decltype(V() < V());
  static constexpr int lanes = sizeof(V) / sizeof(Scalar);
};
template <>
struct Traits<float> {
  using Scalar = float;
  using Bits = int32_t;
  static constexpr int lanes = 1;
};
template <>
struct Traits<double> {
  using Scalar = double;
  using Bits = int64_t;
  static constexpr int lanes = 1;
};

template <class V>
using Scalar = typename Traits<V>::Scalar;
template <class V>
using Bits = typename Traits<V>::Bits;
template <class V>
inline constexpr int lanes = Traits<V>::lanes;

template <class V>
KDKERNELS_INLINE V splat(Scalar<V> value) {
  return V{} + value;
}

template <class To, class From>
KDKERNELS_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

template <class Mask, class V>
KDKERNELS_INLINE V select(Mask mask, V if_true, V if_false) {
  return mask ? if_true : if_false;
}

// The larger and the smaller of two numbers; b if one of them is NaN
template <class V>
KDKERNELS_INLINE V maximum(V a, V b) {
  return select(a > b, a, b);
}
template <class V>
KDKERNELS_INLINE V minimum(V a, V b) {
  return select(a < b, a, b);
}

// All bits but the sign
template <class V>
inline constexpr auto magnitude_bits =
    std::numeric_limits<std::conditional_t<sizeof(Scalar<V>) == 4, int32_t, int64_t>>::max();

template <class V>
KDKERNELS_INLINE V absolute(V a) {
  return bit_cast<V>(Bits<V>(bit_cast<Bits<V>>(a) & magnitude_bits<V>));
}

// a with its sign flipped if b is negative
template <class V>
KDKERNELS_INLINE V flip_sign(V a, V b) {
  return bit_cast<V>(Bits<V>(bit_cast<Bits<V>>(a) ^ (bit_cast<Bits<V>>(b) & ~magnitude_bits<V>)));
}

template <class V>
KDKERNELS_INLINE V square_root(V x) {
  if constexpr (lanes<V> == 1) {
    return std::sqrt(x);
  } else {
    V root{};
    for (int i = 0; i < lanes<V>; ++i) reinterpret_cast<Scalar<V>*>(&root)[i] = std::sqrt(x[i]);
    return root;
  }
}

// 1 / value, or 0 for a value that is not positive
KDKERNELS_INLINE double inverse(double value) { return value > 0 ? 1 / value : 0; }

template <class V>
inline constexpr Scalar<V> infinity = std::numeric_limits<Scalar<V>>::infinity();

}  // namespace kdkernels::math
