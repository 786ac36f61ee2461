// exp, expm1, log and log1p, accurate to about one unit in the last place, without branches or tables, so that
// compilers turn them into vector code. The polynomials are Chebyshev interpolants, computed in higher precision.
#pragma once

#include <cmath>

#include "core/value.h"

namespace kdkernels::math {

template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Unsigned = uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr float lowest = -88.0296919f;     // -127 ln(2): 2^n in bits is 0 from here on
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // few bits, so that integer * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;

  // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2
  struct Exp {
    static constexpr int terms = 6;
    KDKERNELS_INLINE static constexpr float coefficient(int i) {
      constexpr float of[] = {0.5f, 0.1666666716f, 0.04166645556f, 0.008333310485f, 0.001393454149f, 0.0001989198063f};
      return of[i];
    }
  };
  // (2 atanh(s) - 2s) / s^3 as a polynomial in s^2, |s| <= 0.1716
  struct Log {
    static constexpr int terms = 3;
    KDKERNELS_INLINE static constexpr float coefficient(int i) {
      constexpr float of[] = {0.6666668653f, 0.3998831213f, 0.2960102558f};
      return of[i];
    }
  };
};

template <>
struct ExpConstants<double> {
  using Unsigned = uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double lowest = -709.0895657128241;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471803691238;
  static constexpr double ln2_low = 1.9082149292705877e-10;
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;

  struct Exp {
    static constexpr int terms = 11;
    KDKERNELS_INLINE static constexpr double coefficient(int i) {
      constexpr double of[] = {0.5,
                               0.1666666666666667,
                               0.04166666666666667,
                               0.008333333333325544,
                               0.0013888888888883327,
                               0.00019841269876864356,
                               2.4801587327007187e-05,
                               2.755725283351691e-06,
                               2.75572718102198e-07,
                               2.5106274733573296e-08,
                               2.0915442297780116e-09};
      return of[i];
    }
  };
  struct Log {
    static constexpr int terms = 7;
    KDKERNELS_INLINE static constexpr double coefficient(int i) {
      constexpr double of[] = {0.666666666666667,   0.39999999999886393, 0.28571428631861595, 0.22222210183700977,
                               0.18182957719593876, 0.15329464536713094, 0.14644067424413199};
      return of[i];
    }
  };
};

// Horner's rule. A recursion over the index is unrolled by every compiler, and each coefficient is a constant
// expression, as CUDA requires.
template <class Series, int I = 0, class V>
KDKERNELS_INLINE V polynomial(V x) {
  constexpr Scalar<V> coefficient = Series::coefficient(I);
  if constexpr (I == Series::terms - 1) {
    return splat<V>(coefficient);
  } else {
    return polynomial<Series, I + 1>(x) * x + coefficient;
  }
}

// e^x = power * (1 + r + tail) with power = 2^n, r = x - n ln(2), |r| <= ln(2)/2 and tail = e^r - 1 - r
template <class V>
struct ExpParts {
  V power, r, tail;
};

template <class V>
KDKERNELS_INLINE ExpParts<V> exp_parts(V x) {
  using C = ExpConstants<Scalar<V>>;
  using Wide = typename C::Unsigned;
  V shifted = x * C::log2e + C::round_magic;
  V n = shifted - C::round_magic;
  V r = (x - n * C::ln2_high) - n * C::ln2_low;
  constexpr Wide one = Wide(C::mantissa_bits == 23 ? 127 : 1023) << C::mantissa_bits;
  Bits<V> bits;
  if constexpr (lanes<V> == 1) {
    bits = Bits<V>((Wide(bit_cast<Bits<V>>(shifted)) << C::mantissa_bits) + one);
  } else {
    bits = (bit_cast<Bits<V>>(shifted) << C::mantissa_bits) + Scalar<Bits<V>>(one);
  }
  return {bit_cast<V>(bits), r, polynomial<typename C::Exp>(r) * (r * r)};
}

// e^x for x <= 0 (softmax never needs more). Results below half the smallest normal number are 0; NaN stays NaN.
template <class V>
KDKERNELS_INLINE V exp_nonpositive(V x) {
  ExpParts<V> parts = exp_parts(maximum(splat<V>(ExpConstants<Scalar<V>>::lowest), x));
  return parts.power * (parts.tail + parts.r) + parts.power;
}

// For x <= 0: e^x, e^x - 1, its rest e^x - 1 - x, x e^x, and its rest x e^x - (e^x - 1), each accurate near 0. The
// rests are x^2/2 at first order; they are what is left of a divergence when its first-order terms cancel.
template <class V>
struct ExpDifferences {
  V exp, expm1, rest, product, product_rest;
};

template <class V>
KDKERNELS_INLINE ExpDifferences<V> exp_differences(V x) {
  using C = ExpConstants<Scalar<V>>;
  const V one = splat<V>(1);
  V bounded = maximum(splat<V>(C::lowest), x);  // e^lowest and lowest * e^lowest are as good as 0
  ExpParts<V> parts = exp_parts(bounded);
  V excess = parts.power * (parts.tail + parts.r);
  V exp = excess + parts.power;
  V expm1 = excess + (parts.power - one);
  const Bits<V> near = parts.power == one;
  V rest = select(near, parts.tail, expm1 - x);
  V product = bounded * exp;
  V product_rest = select(near, x * x - parts.tail * (one - x), product - expm1);
  return {exp, expm1, rest, product, product_rest};
}

template <class V>
KDKERNELS_INLINE V log_tail(V f) {
  // ln(1 + f) = f - (f^2/2 - s (f^2/2 + 2 s^2/3 + ...)) with s = f / (2 + f), which keeps f exact
  using C = ExpConstants<Scalar<V>>;
  V s = f / (f + Scalar<V>(2));
  V z = s * s;
  V half_square = f * f * Scalar<V>(0.5);
  return s * (half_square + polynomial<typename C::Log>(z) * z) - half_square;
}

// k << n also for negative k, which C++17 leaves undefined for a single integer
template <class V>
KDKERNELS_INLINE Bits<V> shift_left(Bits<V> k, int n) {
  if constexpr (lanes<V> == 1) {
    return Bits<V>(typename ExpConstants<Scalar<V>>::Unsigned(k) << n);
  } else {
    return k << n;
  }
}

template <class V, class Integers>
KDKERNELS_INLINE V to_floating(Integers k) {
  if constexpr (lanes<V> == 1) {
    return Scalar<V>(k);
  } else {
    return __builtin_convertvector(k, V);
  }
}

// x = 2^exponent * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
template <class V>
KDKERNELS_INLINE void split_exponent(V x, V& exponent, V& f) {
  using C = ExpConstants<Scalar<V>>;
  Bits<V> bits = bit_cast<Bits<V>>(x);
  Bits<V> k = (bits - C::sqrt_half_bits) >> C::mantissa_bits;
  f = bit_cast<V>(Bits<V>(bits - shift_left<V>(k, C::mantissa_bits))) - Scalar<V>(1);
  exponent = to_floating<V>(k);
}

// ln(x) for positive, normal, finite x; NaN stays NaN.
template <class V>
KDKERNELS_INLINE V log_positive(V x) {
  using C = ExpConstants<Scalar<V>>;
  V k, f;
  split_exponent(x, k, f);
  return k * C::ln2_high + (f + (log_tail(f) + k * C::ln2_low)) + (x - x);  // x - x is 0, or NaN where x is
}

// ln(a / b), accurate where a is near b
template <class V>
KDKERNELS_INLINE V log_quotient(V a, V b) {
  using C = ExpConstants<Scalar<V>>;
  V k, f;
  split_exponent(a / b, k, f);
  f = select(k == Scalar<V>(0), (a - b) / b, f);
  return k * C::ln2_high + (f + (log_tail(f) + k * C::ln2_low));
}

// For -1 < x < 2^126: ln(1 + x) and its rest ln(1 + x) - x, which is -x^2/2 at first order, each accurate near 0
template <class V>
struct Log1p {
  V value, rest;
};

template <class V>
KDKERNELS_INLINE Log1p<V> log1p_parts(V x) {
  using C = ExpConstants<Scalar<V>>;
  // 1 + x = 2^k (1 + f), where f = 2^-k x + (2^-k - 1) is rounded once, and is x itself near 0
  const Bits<V> k = (bit_cast<Bits<V>>(x + Scalar<V>(1)) - C::sqrt_half_bits) >> C::mantissa_bits;
  const V inverse_power = bit_cast<V>(shift_left<V>((C::mantissa_bits == 23 ? 127 : 1023) - k, C::mantissa_bits));
  const V f = x * inverse_power + (inverse_power - Scalar<V>(1));
  const V exponent = to_floating<V>(k);
  const V tail = log_tail(f) + exponent * C::ln2_low;
  return {exponent * C::ln2_high + (f + tail), exponent * C::ln2_high + ((f - x) + tail)};
}

}  // namespace kdkernels::math
