// Softmax divergences class by class: what one class adds to the sums of its position, and its gradients.
#pragma once

#include "softmax_divergence/cuda_kernels.h"
#include "softmax_divergence/math.h"

namespace kdkernels::cuda {

// The precision of the computation. Where both sides are stored in 16 bits, their own rounding is thousands of times
// that of a float: plain formulas suffice. With a tenth of the instructions they keep up with the memory of a GPU.
struct Exact32 {
  using S = float;
  static constexpr bool plain = false;
};
struct Exact64 {
  using S = double;
  static constexpr bool plain = false;
};
struct Plain32 {
  using S = float;
  static constexpr bool plain = true;
};

// The probabilities of one class: q of the student, p of the teacher
template <class S>
struct Pair {
  S q, p, log_ratio;       // ln(p / q)
  S log_q = 0, log_p = 0;  // for plain formulas only
};

// e^x for x <= 0
template <class N>
__device__ __forceinline__ typename N::S power_of_e(typename N::S x) {
  if constexpr (N::plain) {
    return exp2f(x * 1.44269504f);
  } else {
    return math::exp_nonpositive(x);
  }
}

// e^((x - max) / T). In double precision this includes what rounding cut off x - max, which e^x magnifies.
template <class N, class S = typename N::S>
__device__ __forceinline__ S numerator(S x, S max, S inverse_temperature) {
  const S shifted = x - max, power = power_of_e<N>(shifted * inverse_temperature);
  if constexpr (sizeof(S) < 8) return power;
  return power + power * (math::difference_error(x, max, shifted) * inverse_temperature);
}

// What the softmaxes of a position need besides the logits. Only JS is symmetric in the two sides, to the last bit.
template <class N, Divergence divergence>
struct Softmaxes {
  using S = typename N::S;
  S inverse_temperature;
  S max_s, max_t, sum_s, sum_t;
  math::LogitDifference<S> logit_difference;
  S inverse_s, inverse_t, log_sums, log_s, log_t;

  __device__ __forceinline__ Softmaxes(S inverse_temperature, S max_s, S max_t, S sum_s, S sum_t)
      : inverse_temperature(inverse_temperature),
        max_s(max_s),
        max_t(max_t),
        sum_s(sum_s),
        sum_t(sum_t),
        logit_difference(max_s, max_t),
        inverse_s(S(1) / sum_s),
        inverse_t(S(1) / sum_t),
        log_sums(divergence == Divergence::js ? math::log_ratio_of_sums(sum_t, sum_s)
                                              : math::log_positive(sum_t / sum_s)),
        log_s(math::log_positive(sum_s)),
        log_t(math::log_positive(sum_t)) {}

  __device__ __forceinline__ Pair<S> at(S student, S teacher) const {
    if constexpr (N::plain) {
      const S log_q = (student - max_s) * inverse_temperature - log_s;
      const S log_p = (teacher - max_t) * inverse_temperature - log_t;
      return {power_of_e<N>(log_q), power_of_e<N>(log_p), log_p - log_q, log_q, log_p};
    }
    const S log_ratio = logit_difference(student, teacher) * inverse_temperature - log_sums;
    const S numerator_s = numerator<N>(student, max_s, inverse_temperature);
    const S numerator_t = numerator<N>(teacher, max_t, inverse_temperature);
    if constexpr (sizeof(S) == 8) return {numerator_s / sum_s, numerator_t / sum_t, log_ratio};  // one rounding less
    return {numerator_s * inverse_s, numerator_t * inverse_t, log_ratio};
  }
};

// Sums over the classes, in two levels: terms are added to a part, which is added to the whole every few terms.
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
// center. Where one class has nearly all of the probability, the center is close to the derivative of that class, and
// their distance would drown in rounding errors. The center is therefore kept as the derivative of the likeliest class,
// the pivot, and a rest.
template <class S>
struct Centers {
  Gradients<S> pivot{}, rest{};
};

// How formulas are used: derivatives(pair) of the likeliest classes give the pivots; add(pair, pivots, sums) is called
// for every class; then value(sums) and rests(sums); then gradients(pair, centers) for every class.

// KL(p || q), or KL(q || p) if `reverse`
template <class N>
struct KullbackLeibler {
  using S = typename N::S;
  using Formula = math::KullbackLeibler<S>;
  bool reverse;

  __device__ __forceinline__ static typename Formula::Terms terms_of(const Pair<S>& pair) {
    if constexpr (N::plain) {
      const S difference = pair.q - pair.p;
      return {math::weighted(pair.p, pair.log_ratio) + difference, difference};
    } else {
      return Formula::finish(pair.q, pair.p, pair.log_ratio, Formula::begin(pair.log_ratio));
    }
  }

  __device__ __forceinline__ Pair<S> turned(const Pair<S>& pair) const {
    return reverse ? Pair<S>{pair.p, pair.q, -pair.log_ratio} : pair;
  }
  // ln(p / q) on the side of p; on the side of q the gradient is no distance from a mean.
  __device__ __forceinline__ Gradients<S> derivatives(const Pair<S>& pair) const {
    return reverse ? Gradients<S>{-pair.log_ratio, S(0)} : Gradients<S>{S(0), pair.log_ratio};
  }
  __device__ __forceinline__ void add(const Pair<S>& given, const Gradients<S>& pivot, Sums<S>& sums) const {
    const Pair<S> pair = turned(given);
    const auto terms = terms_of(pair);
    sums.add(Sums<S>::value, terms.value);
    sums.add(Sums<S>::q, pair.q);
    sums.add(Sums<S>::p, pair.p);
    sums.add(Sums<S>::far_q, terms.difference);
    sums.add(Sums<S>::far_p, math::weighted(pair.p, pair.log_ratio - (reverse ? pivot.student : pivot.teacher)));
  }
  __device__ __forceinline__ S value(const Sums<S>& sums) const { return sums.of[Sums<S>::value]; }
  // The differences q - p sum to 0 up to an error that all log-ratios share. At KL = +inf there is no direction to
  // follow.
  __device__ __forceinline__ Gradients<S> rests(const Sums<S>& sums) const {
    const S of_q = sums.of[Sums<S>::far_q] / sums.of[Sums<S>::q];
    const S of_p = value(sums) == math::infinity<S> ? math::infinity<S> : sums.of[Sums<S>::far_p] / sums.of[Sums<S>::p];
    return reverse ? Gradients<S>{of_p, of_q} : Gradients<S>{of_q, of_p};
  }
  __device__ __forceinline__ Gradients<S> gradients(const Pair<S>& given, const Centers<S>& centers) const {
    const Pair<S> pair = turned(given);
    const auto terms = terms_of(pair);
    const Gradients<S>&pivot = centers.pivot, &rest = centers.rest;
    const S of_q = reverse ? rest.teacher : rest.student, of_p = reverse ? rest.student : rest.teacher;
    const S by_q = terms.difference - pair.q * of_q;
    const S distance = (pair.log_ratio - (reverse ? pivot.student : pivot.teacher)) - of_p;
    const S by_p = of_p == math::infinity<S> ? S(0) : math::weighted(pair.p, distance);
    return reverse ? Gradients<S>{by_p, by_q} : Gradients<S>{by_q, by_p};
  }
};

// The terms of math::JensenShannon, computed from logarithms
struct PlainJensenShannon {
  float beta;

  __device__ __forceinline__ float total(float sum_of_values, float /*far_q*/, float /*far_p*/) const {
    return sum_of_values;
  }
  __device__ __forceinline__ math::PairTerms<float> terms(const Pair<float>& pair) const {
    const float rest = 1 - beta, mean = beta * pair.p + rest * pair.q;
    // A mean that underflows belongs to a class without weight.
    const float log_mean = log2f(fmaxf(mean, 1e-37f)) * 0.693147181f;
    const float by_p = beta * (pair.log_p - log_mean), by_q = rest * (pair.log_q - log_mean);
    return {math::weighted(pair.p, by_p) + math::weighted(pair.q, by_q), by_q, by_p, 0, 0};
  }
};

// A divergence that is a sum over the classes of math::PairTerms
template <class S, class Formula>
struct OfPairs {
  Formula formula;

  __device__ __forceinline__ math::PairTerms<S> terms_of(const Pair<S>& pair) const {
    if constexpr (std::is_same_v<Formula, PlainJensenShannon>) {
      return formula.terms(pair);
    } else {
      auto begun = formula.begin(pair.log_ratio);
      formula.go_on(pair.log_ratio, begun);
      return formula.finish(pair.q, pair.p, pair.log_ratio, begun);
    }
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

// Calls body(formula) with the formula of a call. beta = 0 and 1 are the two KL; an invalid beta gives NaN everywhere.
template <class N, Divergence divergence, class Body>
__device__ __forceinline__ void with_formula(bool reverse, double beta, const Body& body) {
  using S = typename N::S;
  if constexpr (divergence == Divergence::kl) {
    // A direction that is known at compile time costs nothing per class.
    if (reverse) {
      body(KullbackLeibler<N>{true});
    } else {
      body(KullbackLeibler<N>{false});
    }
  } else if constexpr (divergence == Divergence::clamped_js) {
    body(OfPairs<S, math::ClampedJensenShannon<S>>{});
  } else if (beta == 0 || beta == 1) {
    body(KullbackLeibler<N>{beta == 1});
  } else {
    const S inside = beta > 0 && beta < 1 ? S(beta) : S(NAN);
    if constexpr (N::plain) {
      body(OfPairs<S, PlainJensenShannon>{{inside}});
    } else {
      body(OfPairs<S, math::JensenShannon<S>>{math::JensenShannon<S>(inside)});
    }
  }
}

// The cross-entropy of the student, and its gradient
template <class N>
struct CrossEntropy {
  using S = typename N::S;
  S others, label, inverse_sum, shifted_label;

  __device__ __forceinline__ CrossEntropy(S label_logit, S max, S others)
      : others(others),
        label(power_of_e<N>(label_logit - max)),
        inverse_sum(S(1) / (others + label)),
        shifted_label(label_logit - max) {}

  __device__ __forceinline__ S value() const { return math::cross_entropy(others, label, shifted_label); }
  __device__ __forceinline__ S gradient(S logit, S max, bool is_label) const {
    return (is_label ? -others : power_of_e<N>(logit - max)) * inverse_sum;
  }
};

}  // namespace kdkernels::cuda
