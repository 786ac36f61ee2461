// Divergences of single elements: their values, and the derivatives by both sides. A probability of 0 adds nothing,
// even where the other factor is infinite; those below the smallest normal number are taken for 0.
#pragma once

#include "core/fast_exp.h"

namespace kdkernels::math {

template <class V>
inline constexpr Scalar<V> smallest_normal = std::numeric_limits<Scalar<V>>::min();
template <class V>
inline constexpr Scalar<V> not_a_number = std::numeric_limits<Scalar<V>>::quiet_NaN();

// weight * value, or the weight alone where it is 0 or NaN
template <class V>
KDKERNELS_INLINE V unless_absent(V weight, V value) {
  return select(weight > Scalar<V>(0), weight * value, weight);
}

// Whether a mask is set in any lane
template <class Mask>
KDKERNELS_INLINE bool any_lane(const Mask& mask) {
  if constexpr (std::is_arithmetic_v<Mask>) {
    return mask != 0;
  } else {
    uint64_t words[sizeof(Mask) / sizeof(uint64_t)], any = 0;
    memcpy(words, &mask, sizeof(mask));
    for (const uint64_t word : words) any |= word;
    return any != 0;
  }
}

// e^x for any x; infinity a little before it overflows, NaN stays NaN.
template <class V>
KDKERNELS_INLINE V exp_any(V x) {
  constexpr Scalar<V> highest = sizeof(Scalar<V>) == 4 ? Scalar<V>(88.37) : Scalar<V>(709.43);  // 2^n is still finite
  const V exp = exp_nonpositive(minimum(splat<V>(highest), x));
  return select(x > highest, splat<V>(infinity<V>), exp);
}

template <class V>
struct Slopes {
  V input, target;
};

// p ln p - p x with x = ln q
template <class V>
struct ProbabilityTerms {
  static constexpr bool input_slope_needs_input = false;

  KDKERNELS_INLINE static Bits<V> absent(V p) { return (p < smallest_normal<V>)&(p > -smallest_normal<V>); }
  KDKERNELS_INLINE static V log_ratio(V x, V p) {
    return select(p < Scalar<V>(0), splat<V>(not_a_number<V>), log_positive(p) - x);
  }
  KDKERNELS_INLINE V value(V x, V p) const { return select(absent(p), V{}, p * log_ratio(x, p)); }
  KDKERNELS_INLINE Slopes<V> slopes(V x, V p) const {
    return {select(absent(p), V{}, -p), select(absent(p), V{}, log_ratio(x, p) + Scalar<V>(1))};
  }
};

// w (ln w - ln v) of two logarithms; the weighting side w is the target's, or the input's if reversed
template <class V>
struct LogProbabilityTerms {
  static constexpr bool input_slope_needs_input = true;
  bool reversed;

  KDKERNELS_INLINE V value(V x, V y) const {
    return reversed ? unless_absent(exp_any(x), x - y) : unless_absent(exp_any(y), y - x);
  }
  KDKERNELS_INLINE Slopes<V> slopes(V x, V y) const {
    const V weight = exp_any(reversed ? x : y);
    const V by_weight = unless_absent(weight, (reversed ? x - y : y - x) + Scalar<V>(1));
    return reversed ? Slopes<V>{by_weight, -weight} : Slopes<V>{-weight, by_weight};
  }
};

// beta p ln(p / m) + (1 - beta) q ln(q / m) of two logarithms, m = beta p + (1 - beta) q, 0 < beta < 1.
//
// With b the larger of p and q, w the weight of the smaller, x = ln(smaller / b) <= 0 and y = w (e^x - 1), m is
// b (1 + y), and the element is b (w x e^x - (1 + y) ln(1 + y)). Where p and q are close, the parts of first order, y,
// cancel and are left out.
template <class V>
struct JensenShannonTerms {
  static constexpr bool input_slope_needs_input = true;
  using S = Scalar<V>;
  S beta;

  struct Pair {
    Bits<V> teacher_larger;
    V larger, weight, x, y;
    ExpDifferences<V> exp;
    Log1p<V> log1p;
  };

  KDKERNELS_INLINE Pair pair(V log_q, V log_p) const {
    const V log_ratio = log_p - log_q;
    Pair of;
    of.teacher_larger = log_ratio > S(0);
    of.larger = exp_any(maximum(log_q, log_p));
    of.weight = select(of.teacher_larger, splat<V>(1 - beta), splat<V>(beta));
    of.x = -absolute(log_ratio);
    of.exp = exp_differences(of.x);
    of.y = of.weight * of.exp.expm1;
    of.log1p = log1p_parts(of.y);
    return of;
  }

  KDKERNELS_INLINE V value(V log_q, V log_p) const {
    const Pair of = pair(log_q, log_p);
    const V one_plus_y = of.y + S(1);
    const V close = of.weight * of.exp.product_rest - (of.y * of.y + of.log1p.rest * one_plus_y);
    const V far = of.weight * of.exp.product - one_plus_y * of.log1p.value;
    return unless_absent(of.larger, maximum(V{}, select(of.y > S(-0.25), close, far)));
  }

  KDKERNELS_INLINE Slopes<V> slopes(V log_q, V log_p) const {
    const Pair of = pair(log_q, log_p);
    const V smaller = select(of.larger == S(0), V{}, of.larger * of.exp.exp);
    const V of_larger = unless_absent(of.larger, -of.log1p.value);  // b ln(b / m)
    const V of_smaller = unless_absent(smaller, of.x - of.log1p.value);
    return {select(of.teacher_larger, of_smaller, of_larger) * (1 - beta),
            select(of.teacher_larger, of_larger, of_smaller) * beta};
  }
};

// e^x - 1 and its rest e^x - 1 - x for |x| < 2, of either sign. With e^x = P (1 + r + tail) and P = 2^n, the rest is
// P tail + (P - 1) r + (P - 1 - n ln 2), whose parts do not cancel.
template <class V>
KDKERNELS_INLINE void exp_and_rest(V x, V& expm1, V& rest) {
  const ExpParts<V> parts = exp_parts(x);
  const V excess = parts.power - Scalar<V>(1);
  const V n_ln2 = x - parts.r;
  expm1 = parts.power * (parts.tail + parts.r) + excess;
  rest = parts.power * parts.tail + (excess * parts.r + (excess - n_ln2));
}

// ln(1 + u) - u for -1/2 < u < 1. With 1 + u = (1 + f) / g, g a power of 2, it is the tail of ln(1 + f) beside
// (g - 1) u and a constant.
template <class V>
KDKERNELS_INLINE V log1p_rest(V u) {
  using S = Scalar<V>;
  const Bits<V> above = u > S(0.41421356), below = u < S(-0.29289322);
  const V g = select(above, splat<V>(S(0.5)), select(below, splat<V>(2), splat<V>(1)));
  const V constant = select(above, splat<V>(S(0.19314718055994531)),                // ln 2 - 1/2
                            select(below, splat<V>(S(0.30685281944005469)), V{}));  // 1 - ln 2
  const V shift = g - S(1);
  return log_tail(u * g + shift) + (constant + shift * u);
}

// KL(w || v) of two outcomes with logits w and v: softplus(v) - softplus(w) - p (v - w), p = sigmoid(w).
//
// The signs of both logits are flipped where w > 0, which exchanges the outcomes: then p is at most 1/2, and nothing
// cancels between large numbers. With d = v - w and u = p (e^d - 1) it is ln(1 + u) - p d, and where d is small
// p (e^d - 1 - d) + (ln(1 + u) - u).
template <class V>
struct BernoulliPair {
  using S = Scalar<V>;
  static constexpr S far = S(16);      // from here on e^d may overflow before long
  V sign, other, difference, p, rest;  // rest = 1 - p
  V expm1, second_order;               // e^d - 1; where d is small, e^d - 1 - d
  Bits<V> close, far_apart;

  KDKERNELS_INLINE BernoulliPair(V weight, V other_logit, V other_minus_weight) {
    const S zero(0), one(1);
    sign = select(weight > zero, splat<V>(-1), splat<V>(1));
    other = other_logit * sign;
    difference = other_minus_weight * sign;
    const V exp_weight = exp_nonpositive(-absolute(weight));
    rest = splat<V>(1) / (exp_weight + one);
    p = exp_weight * rest;
    close = absolute(difference) < one;
    far_apart = Bits<V>(absolute(difference) <= far) == 0;  // also where it is not a number: both are infinite
    exp_and_rest(maximum(splat<V>(-far), minimum(splat<V>(far), difference)), expm1, second_order);
  }

  KDKERNELS_INLINE V value() const {
    const V u = p * expm1;
    const V near = p * second_order + log1p_rest(u);
    const V middle = log1p_parts(u).value - p * difference;
    V result = select(close, near, middle);
    if (any_lane(far_apart)) {
      const V softplus_of_weight = log1p_parts(p / rest).value;
      const V softplus = maximum(V{}, other) + log1p_parts(exp_nonpositive(-absolute(other))).value;
      const V distant = softplus - softplus_of_weight - unless_absent(p, difference);
      result = select(far_apart, select(other == infinity<V>, other * rest, distant), result);
    }
    return maximum(V{}, result);
  }

  KDKERNELS_INLINE V slope_by_weight() const {
    const V slope = unless_absent(p * rest, -difference) * sign;
    return select(absolute(difference) == infinity<V>, V{}, slope);
  }
  // The difference of the two probabilities
  KDKERNELS_INLINE V slope_by_other() const {
    const S zero(0), one(1);
    V slope = p * rest * expm1 / (p * expm1 + one);
    if (any_lane(far_apart)) {
      const V exp_other = exp_nonpositive(-absolute(other));
      slope = select(far_apart, select(other > zero, splat<V>(1), exp_other) / (exp_other + one) - p, slope);
    }
    return slope * sign;
  }
};

template <class V>
struct BinaryTerms {
  static constexpr bool input_slope_needs_input = true;
  using S = Scalar<V>;
  bool reversed, target_is_probability;
  S inverse_temperature;

  // ln(p / (1 - p)): infinite at 0 and 1, NaN outside
  KDKERNELS_INLINE static V logit(V p) {
    const V rest = splat<V>(1) - p, tiny = splat<V>(smallest_normal<V>);
    V value = log_quotient(maximum(tiny, p), maximum(tiny, rest));
    value = select(p < smallest_normal<V>, splat<V>(-infinity<V>), value);
    value = select(rest < smallest_normal<V>, splat<V>(infinity<V>), value);
    return select((p >= S(0)) & (rest >= S(0)), value, splat<V>(not_a_number<V>));
  }
  KDKERNELS_INLINE BernoulliPair<V> pair(V z, V target) const {
    const V s = z * inverse_temperature;
    const V t = target_is_probability ? logit(target) : target * inverse_temperature;
    const V difference = target_is_probability ? s - t : (z - target) * inverse_temperature;
    return reversed ? BernoulliPair<V>(s, t, -difference) : BernoulliPair<V>(t, s, difference);
  }

  KDKERNELS_INLINE V value(V z, V target) const { return pair(z, target).value(); }

  KDKERNELS_INLINE Slopes<V> slopes(V z, V target) const {
    const BernoulliPair<V> of = pair(z, target);
    const V by_weight = of.slope_by_weight(), by_other = of.slope_by_other();
    const V input = (reversed ? by_weight : by_other) * inverse_temperature;
    const V by_teacher = reversed ? by_other : by_weight;
    if (!target_is_probability) return {input, by_teacher * inverse_temperature};
    const V share = target * (splat<V>(1) - target);
    return {input, select(share < smallest_normal<V>, V{}, by_teacher / share)};
  }

  // The derivative by the temperature; an infinite logit has none.
  KDKERNELS_INLINE V slope_by_temperature(V z, V target, const Slopes<V>& by) const {
    V sum = select(absolute(z) == infinity<V>, V{}, z * by.input);
    if (!target_is_probability) sum = sum + select(absolute(target) == infinity<V>, V{}, target * by.target);
    return -sum * inverse_temperature;
  }
};

}  // namespace kdkernels::math
