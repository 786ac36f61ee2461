// Softmax divergences class by class: what one class adds to the sums of its position, and its gradients.
#pragma once

#include "../math/softmax_divergence.h"
#include "softmax_divergence_call.h"

namespace kdkernels::cuda {

// The probabilities of one class: q of the student, p of the teacher
template <class S>
struct Pair {
  S q, p, log_ratio;  // ln(p / q)
};

// e^((x - max) / T). In double precision with what rounding cut off x - max, which e^x magnifies; floats are spared it.
template <class S>
__device__ __forceinline__ S numerator(S x, S max, S inverse_temperature) {
  const S shifted = x - max, power = math::exp_nonpositive(shifted * inverse_temperature);
  if constexpr (sizeof(S) < 8) return power;
  return power + power * (math::difference_error(x, max, shifted) * inverse_temperature);
}

// What the softmaxes of a position need beside the logits
template <class S>
struct Softmaxes {
  S inverse_temperature;
  S max_s, max_t, sum_s, sum_t;
  S offset, offset_error, inverse_s, inverse_t, log_sums;

  __device__ __forceinline__ Softmaxes(S inverse_temperature, S max_s, S max_t, S sum_s, S sum_t)
      : inverse_temperature(inverse_temperature),
        max_s(max_s),
        max_t(max_t),
        sum_s(sum_s),
        sum_t(sum_t),
        offset(max_t - max_s),
        offset_error(math::difference_error(max_t, max_s, offset)),
        inverse_s(S(1) / sum_s),
        inverse_t(S(1) / sum_t),
        log_sums(math::log_positive(sum_t / sum_s)) {}

  // ln(p / q) comes from the logits themselves, rounding errors put back: near 0 it is all that a divergence depends on
  __device__ __forceinline__ Pair<S> at(S student, S teacher) const {
    const S difference = teacher - student;
    const S error = math::difference_error(teacher, student, difference) - offset_error;
    const S numerator_s = numerator(student, max_s, inverse_temperature);
    const S numerator_t = numerator(teacher, max_t, inverse_temperature);
    const S log_ratio = ((difference - offset) + error) * inverse_temperature - log_sums;
    if constexpr (sizeof(S) == 8) return {numerator_s / sum_s, numerator_t / sum_t, log_ratio};  // rounded once less
    return {numerator_s * inverse_s, numerator_t * inverse_t, log_ratio};
  }
};

// Sums over the classes, in two levels: terms join a part, which joins the whole every few terms.
template <class S>
struct Sums {
  enum { value, student, teacher, q, p, far_q, far_p, count };
  static constexpr int terms_of_part = 16;
  S of[count] = {};
  S part[count] = {};
  int terms = 0;

  __device__ __forceinline__ void add(int which, S term) { part[which] += term; }
  __device__ __forceinline__ void close_part() {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      of[k] += part[k];
      part[k] = 0;
    }
    terms = 0;
  }
};

template <class S>
struct Gradients {
  S student, teacher;  // times T
};

// A gradient through a softmax is a probability times the distance of a derivative from its mean over the classes, the
// center. Where one class has nearly all probability the center is close to that class's derivative, and the distance
// would drown in rounding: so the center is kept as the derivative of the likeliest class, the pivot, and a rest.
template <class S>
struct Centers {
  Gradients<S> pivot{}, rest{};
};

// Formulas: derivatives(pair) of the likeliest classes give the pivots; add(pair, pivots, sums) for every class; then
// value(sums) and rests(sums); then gradients(pair, centers).

// KL(p || q), or KL(q || p) where it is reversed
template <class S>
struct KullbackLeibler {
  using Formula = math::KullbackLeibler<S>;
  bool reverse;

  __device__ __forceinline__ Pair<S> turned(const Pair<S>& pair) const {
    return reverse ? Pair<S>{pair.p, pair.q, -pair.log_ratio} : pair;
  }
  // On the side of p it is ln(p / q); on that of q the gradient has no derivative to be relative to.
  __device__ __forceinline__ Gradients<S> derivatives(const Pair<S>& pair) const {
    return reverse ? Gradients<S>{-pair.log_ratio, S(0)} : Gradients<S>{S(0), pair.log_ratio};
  }
  __device__ __forceinline__ void add(const Pair<S>& given, const Gradients<S>& pivot, Sums<S>& sums) const {
    const Pair<S> pair = turned(given);
    const auto terms = Formula::finish(pair.q, pair.p, pair.log_ratio, Formula::begin(pair.log_ratio));
    sums.add(Sums<S>::value, terms.value);
    sums.add(Sums<S>::q, pair.q);
    sums.add(Sums<S>::p, pair.p);
    sums.add(Sums<S>::far_q, terms.difference);
    sums.add(Sums<S>::far_p, math::weighted(pair.p, pair.log_ratio - (reverse ? pivot.student : pivot.teacher)));
  }
  __device__ __forceinline__ S value(const Sums<S>& sums) const { return sums.of[Sums<S>::value]; }
  // The differences q - p sum to 0 but for an error that all log-ratios share. At KL = +inf there is no direction to
  // follow.
  __device__ __forceinline__ Gradients<S> rests(const Sums<S>& sums) const {
    const S of_q = sums.of[Sums<S>::far_q] / sums.of[Sums<S>::q];
    const S of_p = value(sums) == math::infinity<S> ? math::infinity<S> : sums.of[Sums<S>::far_p] / sums.of[Sums<S>::p];
    return reverse ? Gradients<S>{of_p, of_q} : Gradients<S>{of_q, of_p};
  }
  __device__ __forceinline__ Gradients<S> gradients(const Pair<S>& given, const Centers<S>& centers) const {
    const Pair<S> pair = turned(given);
    const auto terms = Formula::finish(pair.q, pair.p, pair.log_ratio, Formula::begin(pair.log_ratio));
    const Gradients<S>&pivot = centers.pivot, &rest = centers.rest;
    const S of_q = reverse ? rest.teacher : rest.student, of_p = reverse ? rest.student : rest.teacher;
    const S by_q = terms.difference - pair.q * of_q;
    const S distance = (pair.log_ratio - (reverse ? pivot.student : pivot.teacher)) - of_p;
    const S by_p = of_p == math::infinity<S> ? S(0) : math::weighted(pair.p, distance);
    return reverse ? Gradients<S>{by_p, by_q} : Gradients<S>{by_q, by_p};
  }
};

// A divergence that is a sum over the classes of math::PairTerms
template <class S, class Formula>
struct OfPairs {
  Formula formula;

  __device__ __forceinline__ math::PairTerms<S> terms_of(const Pair<S>& pair) const {
    auto begun = formula.begin(pair.log_ratio);
    formula.go_on(pair.log_ratio, begun);
    return formula.finish(pair.q, pair.p, pair.log_ratio, begun);
  }
  __device__ __forceinline__ Gradients<S> derivatives(const Pair<S>& pair) const {
    const math::PairTerms<S> terms = terms_of(pair);
    return {terms.q_derivative, terms.p_derivative};
  }
  __device__ __forceinline__ void add(const Pair<S>& pair, const Gradients<S>& pivot, Sums<S>& sums) const {
    const math::PairTerms<S> terms = terms_of(pair);
    sums.add(Sums<S>::value, terms.value);
    sums.add(Sums<S>::student, math::weighted(pair.q, terms.q_derivative - pivot.student));
    sums.add(Sums<S>::teacher, math::weighted(pair.p, terms.p_derivative - pivot.teacher));
    sums.add(Sums<S>::q, pair.q);
    sums.add(Sums<S>::p, pair.p);
    sums.add(Sums<S>::far_q, terms.far_q);
    sums.add(Sums<S>::far_p, terms.far_p);
  }
  __device__ __forceinline__ S value(const Sums<S>& sums) const {
    return formula.total(sums.of[Sums<S>::value], sums.of[Sums<S>::far_q] / sums.of[Sums<S>::q],
                         sums.of[Sums<S>::far_p] / sums.of[Sums<S>::p]);
  }
  __device__ __forceinline__ Gradients<S> rests(const Sums<S>& sums) const {
    return {sums.of[Sums<S>::student] / sums.of[Sums<S>::q], sums.of[Sums<S>::teacher] / sums.of[Sums<S>::p]};
  }
  __device__ __forceinline__ Gradients<S> gradients(const Pair<S>& pair, const Centers<S>& centers) const {
    const math::PairTerms<S> terms = terms_of(pair);
    const Gradients<S>&pivot = centers.pivot, &rest = centers.rest;
    return {math::weighted(pair.q, (terms.q_derivative - pivot.student) - rest.student),
            math::weighted(pair.p, (terms.p_derivative - pivot.teacher) - rest.teacher)};
  }
};

// body(formula) with the formula of a call. beta = 0 and 1 are the two KL; a beta that is none gives NaN everywhere.
template <class S, Divergence divergence, class Body>
__device__ __forceinline__ void with_formula(bool reverse, double beta, const Body& body) {
  if constexpr (divergence == Divergence::kl) {
    body(KullbackLeibler<S>{reverse});
  } else if constexpr (divergence == Divergence::clamped_js) {
    body(OfPairs<S, math::ClampedJensenShannon<S>>{});
  } else if (beta == 0 || beta == 1) {
    body(KullbackLeibler<S>{beta == 1});
  } else {
    const S inside = beta > 0 && beta < 1 ? S(beta) : S(NAN);
    body(OfPairs<S, math::JensenShannon<S>>{math::JensenShannon<S>(inside)});
  }
}

// The cross-entropy ln(sum e^z / e^z_y) as ln(1 + others / e^z_y), which keeps the small loss of a sure student exact
template <class S>
struct CrossEntropy {
  S others, label, inverse_sum, shifted_label;

  __device__ __forceinline__ CrossEntropy(S label_logit, S max, S others)
      : others(others),
        label(math::exp_nonpositive(label_logit - max)),
        inverse_sum(S(1) / (others + label)),
        shifted_label(label_logit - max) {}

  __device__ __forceinline__ S value() const {
    const S tiny = S(1e-30);  // below it the quotient could overflow, and the plain form is as exact
    if (label > tiny) return math::log1p_parts(others / label).value;
    return math::log_positive(others + label) - shifted_label;
  }
  __device__ __forceinline__ S gradient(S logit, S max, bool is_label) const {
    return (is_label ? -others : math::exp_nonpositive(logit - max)) * inverse_sum;
  }
};

}  // namespace kdkernels::cuda
