// Vector registers of the CPU: their types, and loads and stores that convert. Operations use the vector extension of
// GCC and Clang; with other compilers a vector has one lane, and the same kernels compile to plain loops.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/value.h"

namespace kdkernels::cpu {

// Storage types: 16-bit numbers are only loaded and stored, never computed with.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if defined(__GNUC__)
template <class S, int bytes>
struct VectorOf {
  using type __attribute__((vector_size(bytes))) = S;
};
#else
template <class S, int bytes>
struct VectorOf {
  using type = S;
};
#endif
// A vector of S of `bytes` bytes: a register of the instruction set that a kernel is compiled for
template <class S, int bytes>
using Vector = typename VectorOf<S, bytes>::type;

using math::bit_cast;
using math::Bits;
using math::lanes;
using math::Scalar;
using math::select;
using math::splat;

// A vector of as many S as V has lanes
template <class V, class S, bool one = std::is_arithmetic_v<V>>
struct LikeOf {
  using type = Vector<S, lanes<V>* int(sizeof(S))>;
};
template <class V, class S>
struct LikeOf<V, S, true> {
  using type = S;
};
template <class V, class S>
using Like = typename LikeOf<V, S>::type;

template <class To, class From>
KDKERNELS_INLINE To convert(From from) {
  if constexpr (std::is_same_v<To, From>) {
    return from;
#if defined(__GNUC__)
  } else if constexpr (!std::is_arithmetic_v<To>) {
    return __builtin_convertvector(from, To);
#endif
  } else {
    return To(from);
  }
}

// Convert 16-bit numbers to and from 32-bit ones with integer operations: exact up, rounded to nearest even down.
template <class F>
KDKERNELS_INLINE F from_bits(Half, Like<F, uint32_t> bits) {
  using U = Like<F, uint32_t>;
  U magnitude = bits & 0x7fffu;
  U value = bit_cast<U>(bit_cast<F>(U(magnitude << 13)) * 5.192296858534828e33f);   // 2^112 corrects the bias
  value = select(magnitude >= 0x7c00u, U((magnitude << 13) | 0x7f800000u), value);  // infinity, NaN
  return bit_cast<F>(U(value | ((bits & 0x8000u) << 16)));
}
template <class F>
KDKERNELS_INLINE F from_bits(BFloat16, Like<F, uint32_t> bits) {
  return bit_cast<F>(Like<F, uint32_t>(bits << 16));
}
template <class F>
KDKERNELS_INLINE Like<F, uint32_t> to_bits(Half, F value) {
  using U = Like<F, uint32_t>;
  U bits = bit_cast<U>(value);
  U magnitude = bits & 0x7fffffffu;
  U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  U half = select(magnitude < 0x38800000u, subnormal, normal);
  half = select(magnitude >= 0x47800000u, U{} + 0x7c00u, half);
  half = select(magnitude > 0x7f800000u, U{} + 0x7e00u, half);
  return half | ((bits >> 16) & 0x8000u);
}
template <class F>
KDKERNELS_INLINE Like<F, uint32_t> to_bits(BFloat16, F value) {
  using U = Like<F, uint32_t>;
  U bits = bit_cast<U>(value);
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return select((bits & 0x7fffffffu) > 0x7f800000u, U{} + 0x7fc0u, rounded);
}

template <class T>
inline constexpr bool is_16_bit = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

// Load and store lanes<V> consecutive numbers of type T at any address.
template <class V, class T>
KDKERNELS_INLINE V load(const T* source) {
  if constexpr (is_16_bit<T>) {
    Like<V, uint16_t> bits;
    memcpy(&bits, source, sizeof(bits));
    return convert<V>(from_bits<Like<V, float>>(T(), convert<Like<V, uint32_t>>(bits)));
  } else {
    Like<V, T> values;
    memcpy(&values, source, sizeof(values));
    return convert<V>(values);
  }
}
template <class V, class T>
KDKERNELS_INLINE void store(T* destination, V value) {
  if constexpr (is_16_bit<T>) {
    auto bits = convert<Like<V, uint16_t>>(to_bits(T(), convert<Like<V, float>>(value)));
    memcpy(destination, &bits, sizeof(bits));
  } else {
    auto values = convert<Like<V, T>>(value);
    memcpy(destination, &values, sizeof(values));
  }
}

KDKERNELS_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// 0, 1, 2, ...
template <class V>
KDKERNELS_INLINE Bits<V> lane_numbers() {
  Bits<V> numbers{};
  for (int i = 0; i < lanes<V>; ++i) reinterpret_cast<Scalar<Bits<V>>*>(&numbers)[i] = i;
  return numbers;
}

// `value` in the first `count` lanes, `fill` in the others
template <class V>
KDKERNELS_INLINE V keep_lanes(V value, int64_t count, Scalar<V> fill) {
  return select(lane_numbers<V>() < Scalar<Bits<V>>(count), value, splat<V>(fill));
}

// Copies count < 2 * most numbers, `most` a power of 2, in pieces of fixed size: a copy of unknown size would be a
// function call.
template <int most, class T>
KDKERNELS_INLINE void copy_pieces(T* destination, const T* source, int64_t count) {
  if constexpr (most > 0) {
    if (count & most) {
      memcpy(destination, source, most * sizeof(T));
      destination += most;
      source += most;
    }
    copy_pieces<most / 2>(destination, source, count);
  }
}

// Load and store the last, partly filled vector of `count` <= lanes<V> numbers; the other lanes get `fill`.
template <class V, class T>
KDKERNELS_INLINE V load_part(const T* source, int64_t count, Scalar<V> fill) {
  T buffer[lanes<V>] = {};
  copy_pieces<lanes<V>>(buffer, source, count);
  return keep_lanes(load<V>(buffer), count, fill);
}
template <class V, class T>
KDKERNELS_INLINE void store_part(T* destination, V value, int64_t count) {
  T buffer[lanes<V>];
  store(buffer, value);
  copy_pieces<lanes<V>>(destination, buffer, count);
}

// Loads one number.
template <class S, class T>
KDKERNELS_INLINE S load_one(const T* source) {
  return load<S>(source);
}

template <class V>
KDKERNELS_INLINE Scalar<V> lane(const V& vector, int i) {
  return reinterpret_cast<const Scalar<V>*>(&vector)[i];
}
template <class V, class T>
KDKERNELS_INLINE void set_lane(V& vector, int i, T value) {
  reinterpret_cast<Scalar<V>*>(&vector)[i] = Scalar<V>(value);
}

// Reduces over the lanes by halves, which is a fixed order.
template <class V, class Combine>
KDKERNELS_INLINE Scalar<V> reduce_lanes(V vector, const Combine& combine) {
  if constexpr (lanes<V> == 1) {
    return lane(vector, 0);
  } else if constexpr (lanes<V> == 2) {
    return combine(lane(vector, 0), lane(vector, 1));
  } else {
    using Half = Vector<Scalar<V>, int(sizeof(V)) / 2>;
    Half halves[2];
    memcpy(halves, &vector, sizeof(vector));
    return reduce_lanes(Half(combine(halves[0], halves[1])), combine);
  }
}
template <class V>
KDKERNELS_INLINE Scalar<V> sum_lanes(V vector) {
  return reduce_lanes(vector, [](auto a, auto b) { return a + b; });
}
template <class V>
KDKERNELS_INLINE Scalar<V> max_lanes(V vector) {
  return reduce_lanes(vector, [](auto a, auto b) { return math::maximum(a, b); });
}

// A sum of vectors that is accurate well beyond their own precision: in double for float, compensated for double
template <class V>
struct ExactSum {
  static constexpr bool is_float = sizeof(Scalar<V>) == 4;
  static constexpr int parts = is_float && lanes<V> > 1 ? 2 : 1;
  using Part = std::conditional_t<lanes<V> == 1, double, Vector<double, int(sizeof(V))>>;
  Part sums[parts] = {}, errors[parts] = {};

  KDKERNELS_INLINE void add(V values) {
    if constexpr (parts == 2) {
      Vector<float, int(sizeof(V)) / 2> halves[2];
      memcpy(halves, &values, sizeof(values));
      sums[0] = sums[0] + convert<Part>(halves[0]);
      sums[1] = sums[1] + convert<Part>(halves[1]);
    } else if constexpr (is_float) {
      sums[0] = sums[0] + convert<Part>(values);
    } else {
      const Part total = sums[0] + values, added = total - sums[0];
      errors[0] = errors[0] + ((sums[0] - (total - added)) + (values - added));
      sums[0] = total;
    }
  }
  KDKERNELS_INLINE long double lane_sum(int i) const {
    return static_cast<long double>(lane(sums[i / lanes<Part>], i % lanes<Part>)) +
           lane(errors[i / lanes<Part>], i % lanes<Part>);
  }
  KDKERNELS_INLINE long double total() const {
    if constexpr (is_float) {
      return sum_lanes(parts == 2 ? sums[0] + sums[parts - 1] : sums[0]);
    } else {
      long double sum = 0;
      for (int i = 0; i < lanes<V>; ++i) sum += lane_sum(i);
      return sum;
    }
  }
};

}  // namespace kdkernels::cpu
