// Divergences between the softmax distributions of one row of student and one row of teacher logits.
//
// Logits enter shifted by the maximum of their row and divided by the temperature, so that they are at most 0:
// s = (z_s - max z_s) / T, t = (z_t - max z_t) / T. Sums over the classes of the row:
//   d_s = sum e^s,  d_t = sum e^t;   q = e^s / d_s (student), p = e^t / d_t (teacher).
// A class with p = 0 adds nothing to a sum weighted by p, even where the other factor is infinite.
#pragma once

#include "core/fast_exp.h"

namespace kdkernels::math {

template <class V>
KDKERNELS_INLINE V weighted(V weight, V value) {
  return select(weight > Scalar<V>(0), weight * value, weight);
}

// What rounding cuts off a - b, or 0 if the difference is infinite
template <class V>
KDKERNELS_INLINE V difference_error(V a, V b, V difference) {
  V b_part = a - difference;
  V error = (a - (difference + b_part)) + (b_part - b);
  return select(error == error, error, V{});
}

// ln(a / b) of two positive sums, which changes its sign and nothing else where a and b are exchanged
template <class V>
KDKERNELS_INLINE V log_ratio_of_sums(V a, V b) {
  const auto less = a < b;
  const V log = log_positive(select(less, b, a) / select(less, a, b));
  return select(less, -log, log);
}

// T ln(p / q) without the constant of the row that comes from the sums: the difference of the two logits of a class,
// each relative to the maximum of its row. What rounding cut off is added back, because near 0 a divergence depends on
// this difference alone.
template <class V>
struct LogitDifference {
  V offset, offset_error;

  KDKERNELS_INLINE LogitDifference(V max_s, V max_t)
      : offset(max_t - max_s), offset_error(difference_error(max_t, max_s, offset)) {}
  KDKERNELS_INLINE V operator()(V z_s, V z_t) const {
    const V difference = z_t - z_s;
    const V error = difference_error(z_t, z_s, difference) - offset_error;
    return (difference - offset) + error;
  }
};

// The cross-entropy ln(sum e^z / e^z_y) as ln(1 + others / e^z_y), which keeps the small loss of a confident student
// exact. The logits are relative to the maximum: `label` is e^z_y, `others` the sum over the other classes.
template <class V>
KDKERNELS_INLINE V cross_entropy(V others, V label, V label_logit) {
  const V tiny = splat<V>(Scalar<V>(1e-30));  // below it the quotient could overflow, and the plain form is as exact
  const V odds = others / maximum(tiny, label);
  const V plain = log_positive(others + label) - label_logit;
  return select(label > tiny, log1p_parts(odds).value, plain);
}

// A formula comes in parts, so that a kernel can compute one part for many classes before the next part: a processor
// looks only some 200 operations ahead, and with shorter chains of dependent operations it finds more to do in
// parallel.

// KL(p || q) = sum p ln(p/q). Since sum (q - p) = 0, adding q - p to every term changes only the rounding: each term
// becomes p (e^-r - 1 + r) >= 0 with r = ln(p/q), which is of second order in r, and an error common to all r cancels.
// The sum is therefore accurate to a few units in the last place even where teacher and student nearly agree.
template <class V>
struct KullbackLeibler {
  struct Begun {
    V teacher_larger, student_larger;  // the term as a share of p or q, whichever is larger
    V expm1;
  };
  struct Terms {
    V value;
    V difference;  // q - p, which is T times the gradient by the student's logit
  };

  KDKERNELS_INLINE static Begun begin(V log_ratio) {
    ExpDifferences<V> e = exp_differences(-absolute(log_ratio));
    return {e.rest, e.product_rest, e.expm1};
  }
  KDKERNELS_INLINE static Terms finish(V q, V p, V log_ratio, const Begun& begun) {
    auto teacher_larger = log_ratio > Scalar<V>(0);
    V larger = select(teacher_larger, p, q);
    return {weighted(larger, select(teacher_larger, begun.teacher_larger, begun.student_larger)),
            weighted(larger, select(teacher_larger, begun.expm1, -begun.expm1))};
  }
};

// What one class contributes to a divergence J of q and p: its term, and the derivatives g_q and g_p by q and by p. By
// the Jacobian of softmax, T dJ/dz_s = q (g_q - sum q g_q); a constant added to all g_q changes nothing. `far_q` and
// `far_p` are for the total of the formula.
template <class V>
struct PairTerms {
  V value;
  V q_derivative, p_derivative;
  V far_q, far_p;
};

// J = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1.
//
// With b the larger of p and q, w the weight of the smaller, x = ln(smaller / b) <= 0 and y = w (e^x - 1), m is
// b (1 + y) and the term is b (w x e^x - (1 + y) ln(1 + y)). Where p and q are close, its first-order parts cancel and
// are left out. Where they are far apart, J is close to its bound, h = -beta ln(beta) - (1 - beta)
// ln(1 - beta): with k = w / (1 - w) and e = ln(1 + k e^x), a class takes b ((1 - w) e + w e^x (e - ln(k) - x)) from
// its share of h, -(beta ln(beta) p + (1 - beta) ln(1 - beta) q).
template <class V>
struct JensenShannon {
  using S = Scalar<V>;
  S beta;
  S log_beta, log_rest;  // ln(beta), ln(1 - beta)

  struct Begun {
    V y, exp, product, product_rest;  // y; e^x, x e^x, x e^x - (e^x - 1)
    Log1p<V> log1p;
  };

  KDKERNELS_INLINE explicit JensenShannon(S beta)
      : beta(beta), log_beta(S(std::log(double(beta)))), log_rest(S(std::log1p(-double(beta)))) {}

  KDKERNELS_INLINE Begun begin(V log_ratio) const {
    V weight = select(log_ratio > S(0), splat<V>(1 - beta), splat<V>(beta));
    ExpDifferences<V> e = exp_differences(-absolute(log_ratio));
    return {weight * e.expm1, e.exp, e.product, e.product_rest, Log1p<V>()};
  }
  KDKERNELS_INLINE void go_on(V log_ratio, Begun& begun) const {
    V odds = select(log_ratio > S(0), splat<V>((1 - beta) / beta), splat<V>(beta / (1 - beta)));
    begun.log1p = log1p_parts(select(begun.exp < S(1.0 / 16), odds * begun.exp, begun.y));
  }

  KDKERNELS_INLINE PairTerms<V> finish(V q, V p, V log_ratio, const Begun& begun) const {
    const S rest = 1 - beta;
    const Bits<V> teacher_larger = log_ratio > S(0);
    V larger = select(teacher_larger, p, q);
    V weight = select(teacher_larger, splat<V>(rest), splat<V>(beta));
    V log_odds = select(teacher_larger, splat<V>(log_rest - log_beta), splat<V>(log_beta - log_rest));
    V log_larger_weight = select(teacher_larger, splat<V>(log_beta), splat<V>(log_rest));
    V y = begun.y, exp = begun.exp;
    const Bits<V> far = exp < S(1.0 / 16);
    const Log1p<V> log1p = begun.log1p;
    V one_plus_y = y + S(1);
    V close = weight * begun.product_rest - (y * y + log1p.rest * one_plus_y);
    V middle = weight * begun.product - one_plus_y * log1p.value;
    V near_value = select(y > S(-0.25), close, middle);
    V far_value = weight * (begun.product - exp * (log1p.value - log_odds)) - (splat<V>(1) - weight) * log1p.value;
    V log_mean = log1p.value + select(far, log_larger_weight, V{});  // ln(m / larger)
    V log_p = minimum(log_ratio, V{}) - log_mean;                    // ln(p / m)
    V log_q = -maximum(log_ratio, V{}) - log_mean;
    return {weighted(larger, select(far, far_value, near_value)), log_q * rest, log_p * beta, select(far, q, V{}),
            select(far, p, V{})};
  }

  // far_q and far_p are the probabilities of the far classes, as shares of the whole so that they are exact near 1
  KDKERNELS_INLINE V total(V sum_of_values, V far_q, V far_p) const {
    // The second part is 0 at beta = 1/2, where the result is symmetric to the last bit.
    const S of_p = beta * log_beta, of_q = (1 - beta) * log_rest;
    return sum_of_values - ((far_p + far_q) * of_p + far_q * (of_q - of_p));
  }
};

// The competition term as published: KL(m || p)/2 + KL(m || q)/2 of probabilities clamped to [0.01, 0.99] after
// the mean m = (p + q)/2 is taken, not renormalized. Outside the range a clamp has gradient 0.
template <class V>
struct ClampedJensenShannon {
  struct Begun {};

  static constexpr Scalar<V> low = Scalar<V>(0.01), high = Scalar<V>(0.99);

  KDKERNELS_INLINE static V clamp(V x) { return minimum(splat<V>(high), maximum(splat<V>(low), x)); }
  // 1 where the clamp lets the gradient through, ends included
  KDKERNELS_INLINE static V inside(V x) { return select(clamp(x) == x, splat<V>(1), V{}); }
  KDKERNELS_INLINE Begun begin(V /*log_ratio*/) const { return {}; }
  KDKERNELS_INLINE void go_on(V /*log_ratio*/, Begun& /*begun*/) const {}
  KDKERNELS_INLINE PairTerms<V> finish(V q, V p, V /*log_ratio*/, Begun /*begun*/) const {
    constexpr Scalar<V> half = Scalar<V>(0.5);
    V m = (p + q) * half;
    V clamped_p = clamp(p), clamped_q = clamp(q), clamped_m = clamp(m);
    V gap = (log_quotient(clamped_m, clamped_p) + log_quotient(clamped_m, clamped_q)) * half;
    V through_mean = inside(m) * (gap + Scalar<V>(1)) * half;
    return {clamped_m * gap, through_mean - inside(q) * clamped_m / clamped_q * half,
            through_mean - inside(p) * clamped_m / clamped_p * half, V{}, V{}};
  }

  KDKERNELS_INLINE V total(V sum_of_values, V /*far_q*/, V /*far_p*/) const { return sum_of_values; }
};

// KL(w || m) with m = alpha w + (1 - alpha) v and 0 < alpha < 1, where w is the teacher's distribution p and v the
// student's q, or the other way round if `reverse`. Since sum (m - w) = 0, m - w is added to every term.
//
// With b the larger of w and v, x = ln(smaller / b) <= 0 and y the share of the smaller in m times (e^x - 1), m is
// b (1 + y). Where w is larger, its term is w (y - ln(1 + y)); where v is, it is
// v (e^x (x - ln(1 + y)) - (1 - alpha) (e^x - 1)). Where they are close the first-order parts cancel and are left out.
// Where they are far apart, 1 + y is the share of the larger times 1 + k e^x, k the quotient of the shares.
template <class V>
struct SkewKullbackLeibler {
  using S = Scalar<V>;
  S alpha, log_alpha, log_rest;  // ln(alpha), ln(1 - alpha)
  bool reverse;

  struct Begun {
    V y, exp, expm1, product, product_rest;
    Log1p<V> log1p;
  };

  KDKERNELS_INLINE SkewKullbackLeibler(S alpha, bool reverse)
      : alpha(alpha),
        log_alpha(S(std::log(double(alpha)))),
        log_rest(S(std::log1p(-double(alpha)))),
        reverse(reverse) {}

  // Of w and v: one number where w is larger, the other elsewhere
  KDKERNELS_INLINE V by_larger(V log_ratio, S w_larger, S v_larger) const {
    const V of_w = splat<V>(w_larger), of_v = splat<V>(v_larger);
    return reverse ? select(log_ratio < S(0), of_w, of_v) : select(log_ratio > S(0), of_w, of_v);
  }
  KDKERNELS_INLINE Begun begin(V log_ratio) const {
    const ExpDifferences<V> e = exp_differences(-absolute(log_ratio));
    return {by_larger(log_ratio, 1 - alpha, alpha) * e.expm1, e.exp, e.expm1, e.product, e.product_rest, Log1p<V>()};
  }
  KDKERNELS_INLINE void go_on(V log_ratio, Begun& begun) const {
    const V odds = by_larger(log_ratio, (1 - alpha) / alpha, alpha / (1 - alpha));
    begun.log1p = log1p_parts(select(begun.exp < S(1.0 / 16), odds * begun.exp, begun.y));
  }
  KDKERNELS_INLINE PairTerms<V> finish(V q, V p, V log_ratio, const Begun& begun) const {
    const S rest = 1 - alpha;
    const V w = reverse ? q : p, v = reverse ? p : q, ratio = reverse ? -log_ratio : log_ratio;
    const Bits<V> w_larger = ratio > S(0), far = begun.exp < S(1.0 / 16);
    const V y = begun.y, log1p_rest = begun.log1p.rest;
    const V share = by_larger(log_ratio, alpha, rest), other_share = by_larger(log_ratio, rest, alpha);
    const V mean = select(far, share + other_share * begun.exp, y + S(1));  // m / larger
    const V log_mean = begun.log1p.value + select(far, by_larger(log_ratio, log_alpha, log_rest), V{});
    const V of_w = select(far, y - log_mean, -log1p_rest);
    const V of_v = select(far, (begun.product - begun.exp * log_mean) - begun.expm1 * rest,
                          begun.product_rest - (y * begun.expm1 + begun.exp * log1p_rest));
    const V excess = by_larger(log_ratio, -rest, rest) * begun.expm1 / mean;  // w / m - 1
    const V by_w = (minimum(ratio, V{}) - log_mean) - excess * alpha, by_v = excess * -rest;
    return {weighted(select(w_larger, w, v), select(w_larger, of_w, of_v)), reverse ? by_w : by_v,
            reverse ? by_v : by_w, V{}, V{}};
  }
  KDKERNELS_INLINE V total(V sum_of_values, V /*far_q*/, V /*far_p*/) const { return sum_of_values; }
};

// sum |p - q| / 2, whose derivative is 0 where p = q. The sum of p - q is 0 but for an error that all log-ratios share;
// its effect on the sum is taken away.
template <class V>
struct TotalVariationDistance {
  using S = Scalar<V>;
  struct Begun {
    V share;  // |p - q| / 2 as a share of the larger
  };

  KDKERNELS_INLINE Begun begin(V log_ratio) const { return {exp_differences(-absolute(log_ratio)).expm1 * S(-0.5)}; }
  KDKERNELS_INLINE void go_on(V /*log_ratio*/, Begun& /*begun*/) const {}
  KDKERNELS_INLINE PairTerms<V> finish(V q, V p, V log_ratio, const Begun& begun) const {
    const Bits<V> teacher_larger = log_ratio > S(0);
    const V half = select(teacher_larger, splat<V>(S(0.5)), select(log_ratio < S(0), splat<V>(S(-0.5)), V{}));
    const V value = weighted(select(teacher_larger, p, q), begun.share);
    return {value, -half, half, select(teacher_larger, value, -value) * S(2), p * half};
  }
  KDKERNELS_INLINE V total(V sum_of_values, V excess, V slope) const { return sum_of_values - excess * slope; }
};

// 1 / (1 + e^-x) and 1 / (1 + e^x), and the logarithms of their inverses, each accurate where it is small
template <class V>
struct Logistic {
  V probability, rest;  // of x, of -x
  V minus_log, minus_log_rest;

  KDKERNELS_INLINE explicit Logistic(V x) {
    const V exp = exp_nonpositive(-absolute(x)), log = log1p_parts(exp).value;
    const V larger = splat<V>(1) / (exp + Scalar<V>(1)), smaller = exp * larger;
    const Bits<V> positive = x > Scalar<V>(0);
    probability = select(positive, larger, smaller);
    rest = select(positive, smaller, larger);
    minus_log = maximum(-x, V{}) + log;
    minus_log_rest = maximum(x, V{}) + log;
  }
};

// KL of (p_y, 1 - p_y) and (q_y, 1 - q_y) from the log-odds ln((1 - q_y) / q_y) = a of the student and b of the
// teacher, and the difference (1 - q_y) - (1 - p_y). With d = a - b and c = 1 - p_y it is ln(1 + c (e^d - 1)) - c d, or
// the same with c = p_y and -d; where d is small, the smaller c is taken and the first-order parts are left out.
template <class V>
struct TargetClassDivergence {
  V value, difference;

  KDKERNELS_INLINE TargetClassDivergence(V a, V b, V d) {
    using S = Scalar<V>;
    const Logistic<V> student(a), teacher(b);
    const V far_difference = select(a > S(0), teacher.rest - student.rest, student.probability - teacher.probability);
    const V of_label = weighted(teacher.rest, student.minus_log_rest - teacher.minus_log_rest);
    const V of_others = weighted(teacher.probability, student.minus_log - teacher.minus_log);
    const V far_value = (of_label - far_difference) + (of_others + far_difference);

    const Bits<V> label_rare = b > S(0);
    const V c = minimum(teacher.rest, teacher.probability), change = select(label_rare, -d, d);
    const Bits<V> grows = change > S(0);
    const ExpDifferences<V> e = exp_differences(-absolute(d));
    const V expm1 = select(grows, -e.expm1 / e.exp, e.expm1);
    const V expm1_rest = select(grows, e.product_rest / e.exp, e.rest);
    const V y = c * expm1;
    const V near_value = log1p_parts(y).rest + c * expm1_rest;
    const V near_difference = y * (splat<V>(1) - c) / (y + S(1));

    const Bits<V> near = absolute(d) < S(1);
    value = select(near, near_value, far_value);
    difference = select(near, select(label_rare, -near_difference, near_difference), far_difference);
  }
};

}  // namespace kdkernels::math
