// One strip of logits: lanes<V> positions side by side (a lane a position) or one position whose classes fill
// the lanes. Either way n vectors of student and of teacher logits lie in scratch, and stay in cache for all the
// passes that the divergence needs; main memory is read once before and written once after.
#pragma once

#include "../../math/accumulate.h"
#include "../../math/softmax_divergence.h"
#include "../softmax_call.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

template <class V>
struct Strip {
  static constexpr int arrays = 5;
  V *input, *target;        // logits on entry; then probabilities; on return the gradients that were asked for
  V* log_ratio;             // ln(p / q)
  V* slope;                 // derivatives between passes
  V* hard;                  // the hard-label term's part of the gradient
  const int64_t* label_at;  // where the label of each lane's position lies, counted in numbers; -1 for none
  int64_t n;

  // `memory` holds arrays * n vectors
  Strip(void* memory, int64_t n) : input(static_cast<V*>(memory)), label_at(nullptr), n(n) {
    target = input + n;
    log_ratio = input + 2 * n;
    slope = input + 3 * n;
    hard = input + 4 * n;
  }
};

template <class S>
struct StripOptions {
  S inverse_temperature;
  S beta;
  bool reverse;     // KL(q || p) instead of KL(p || q)
  bool labels;      // also the cross-entropy of the student
  bool divergence;  // false where its weight is 0
  bool want_input_gradient, want_target_gradient;
};

template <class V>
struct StripResult {
  V divergence{};
  V cross_entropy{};
};

// Reduces over the lanes where they hold classes of one position; keeps them apart where they are positions.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE V across_sum(V value) {
  if constexpr (classes_in_lanes) {
    return splat<V>(sum_lanes(value));
  } else {
    return value;
  }
}
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE V row_maximum(const V* row, int64_t n) {
  V result = row[0];
  for (int64_t i = 1; i < n; ++i) result = math::maximum(result, row[i]);
  if constexpr (classes_in_lanes) result = splat<V>(max_lanes(result));
  return result;
}

// For every i < n calls body(i, sums...), and gathers what is added to the sums.
template <bool classes_in_lanes, class V, int count, class Body>
KDKERNELS_INLINE void for_each_with_sums(int64_t n, V (&totals)[count], const Body& body) {
  math::BlockedSum<V> sums[count];
  constexpr int64_t block = math::BlockedSum<V>::block;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    for (int64_t i = begin; i < end; ++i) body(i, sums);
    for (int s = 0; s < count; ++s) sums[s].close_block();
  }
  for (int s = 0; s < count; ++s) totals[s] = across_sum<classes_in_lanes>(sums[s].total);
}

// The cross-entropy ln(sum e^z / e^z_y) as ln(1 + others / e^z_y), which keeps the small loss of a sure student
// exact; `hard` gets the gradient times the sum over all classes, which is returned in `sum`.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE V hard_label_term(const Strip<V>& strip, V maximum, V& sum) {
  using S = Scalar<V>;
  constexpr int positions = classes_in_lanes ? 1 : lanes<V>;
  for (int64_t i = 0; i < strip.n; ++i) strip.hard[i] = math::exp_nonpositive(strip.input[i] - maximum);
  S* const hard = reinterpret_cast<S*>(strip.hard);
  const S* const logits = reinterpret_cast<const S*>(strip.input);
  S labels[positions] = {}, label_logits[positions] = {};
  for (int l = 0; l < positions; ++l) {
    if (strip.label_at[l] < 0) continue;
    label_logits[l] = logits[strip.label_at[l]];
    labels[l] = hard[strip.label_at[l]];
    hard[strip.label_at[l]] = 0;
  }
  V others[1];
  for_each_with_sums<classes_in_lanes>(strip.n, others, [&](int64_t i, auto& sums) { sums[0].add(strip.hard[i]); });
  for (int l = 0; l < positions; ++l) {
    if (strip.label_at[l] >= 0) hard[strip.label_at[l]] = -lane(others[0], l);
  }
  V label, logit;
  if constexpr (classes_in_lanes) {
    label = splat<V>(labels[0]);
    logit = splat<V>(label_logits[0]);
  } else {
    label = load<V>(labels);
    logit = load<V>(label_logits);
  }
  sum = others[0] + label;
  const V tiny = splat<V>(S(1e-30));  // below it the quotient could overflow, and the plain form is as exact
  const V odds = others[0] / math::maximum(tiny, label);
  return select(label > tiny, math::log1p_parts(odds).value, math::log_positive(sum) - (logit - maximum));
}

// The numerators of both softmaxes in place of the logits, and what makes them, and log_ratio, what they are to be.
template <class V>
struct SoftmaxPair {
  V inverse_s, inverse_t;  // q = input * inverse_s, p = target * inverse_t
  V log_sums;              // ln(p / q) = log_ratio * inverse_temperature - log_sums
  Scalar<V> inverse_temperature;
};

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE SoftmaxPair<V> softmax_pair(const Strip<V>& strip, V max_s, V max_t, Scalar<V> inverse_temperature) {
  // ln(p / q) from the logits themselves, rounding errors put back: near 0 it is all that a divergence depends on.
  const V offset = max_t - max_s;
  const V offset_error = math::difference_error(max_t, max_s, offset);
  V sums[2];
  for_each_with_sums<classes_in_lanes>(strip.n, sums, [&](int64_t i, auto& sum) {
    const V z_s = strip.input[i], z_t = strip.target[i];
    const V difference = z_t - z_s;
    const V error = math::difference_error(z_t, z_s, difference) - offset_error;
    strip.log_ratio[i] = (difference - offset) + error;
    sum[0].add(strip.input[i] = math::exp_nonpositive((z_s - max_s) * inverse_temperature));
    sum[1].add(strip.target[i] = math::exp_nonpositive((z_t - max_t) * inverse_temperature));
  });
  const V one = splat<V>(1);
  return {one / sums[0], one / sums[1], math::log_positive(sums[1] / sums[0]), inverse_temperature};
}

// Leaves probability * (derivative - mean derivative) * scale in place of the probability. `mean` is the mean up to
// rounding; what rounding left is found from the differences to it, which are exact where they are small.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void through_softmax(V* probability, const V* derivative, int64_t n, V mean, V scale) {
  V rest[1];
  for_each_with_sums<classes_in_lanes>(
      n, rest, [&](int64_t i, auto& sums) { sums[0].add(math::weighted(probability[i], derivative[i] - mean)); });
  for (int64_t i = 0; i < n; ++i) {
    probability[i] = math::weighted(probability[i], (derivative[i] - mean) - rest[0]) * scale;
  }
}

// KL(p || q): q is the student's and p the teacher's distribution, or the other way round
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE V kl_strip(const Strip<V>& strip, const SoftmaxPair<V>& pair, bool reverse, bool want_q, bool want_p,
                            V scale) {
  using Formula = math::KullbackLeibler<V>;
  V* const q = reverse ? strip.target : strip.input;
  V* const p = reverse ? strip.input : strip.target;
  const V inverse_q = reverse ? pair.inverse_t : pair.inverse_s, inverse_p = reverse ? pair.inverse_s : pair.inverse_t;
  const V sign = splat<V>(reverse ? -1 : 1), log_sums = pair.log_sums * sign;
  const V inverse_temperature = sign * pair.inverse_temperature;
  const bool keep = want_q || want_p;
  V sums[3];
  for_each_with_sums<classes_in_lanes>(strip.n, sums, [&](int64_t i, auto& sum) {
    const V log_ratio = strip.log_ratio[i] * inverse_temperature - log_sums;
    const V here_q = q[i] * inverse_q, here_p = p[i] * inverse_p;
    const typename Formula::Terms terms = Formula::terms(here_q, here_p, log_ratio);
    sum[0].add(terms.value);
    sum[1].add(terms.difference);
    if (keep) {
      q[i] = here_q;
      strip.slope[i] = terms.difference;
    }
    if (want_p) {
      p[i] = here_p;
      strip.log_ratio[i] = log_ratio;
      sum[2].add(math::weighted(here_p, log_ratio));
    }
  });
  if (want_q) {
    // The differences sum to 0, but for the error that all log-ratios share; it is taken out here.
    const V shared = sums[1];
    for (int64_t i = 0; i < strip.n; ++i) q[i] = (strip.slope[i] - q[i] * shared) * scale;
  }
  if (want_p) {
    // At KL = +inf there is no direction to follow: the gradient is 0.
    const V mean = select(sums[0] == math::infinity<V>, V{}, sums[2]);
    through_softmax<classes_in_lanes>(p, strip.log_ratio, strip.n, mean, scale);
    for (int64_t i = 0; i < strip.n; ++i) p[i] = select(sums[0] == math::infinity<V>, V{}, p[i]);
  }
  return sums[0];
}

// A divergence that is a sum over the classes of math::PairTerms
template <bool classes_in_lanes, class V, class Formula>
KDKERNELS_INLINE V pair_strip(const Strip<V>& strip, const SoftmaxPair<V>& pair, const Formula& formula, bool want_q,
                              bool want_p, V scale) {
  V sums[7];
  for_each_with_sums<classes_in_lanes>(strip.n, sums, [&](int64_t i, auto& sum) {
    const V q = strip.input[i] * pair.inverse_s, p = strip.target[i] * pair.inverse_t;
    const math::PairTerms<V> terms = formula(q, p, strip.log_ratio[i] * pair.inverse_temperature - pair.log_sums);
    sum[0].add(terms.value);
    sum[1].add(terms.far_q);
    sum[2].add(terms.far_p);
    sum[3].add(q);
    sum[4].add(p);
    if (want_q) {
      strip.input[i] = q;
      strip.slope[i] = terms.q_derivative;
      sum[5].add(math::weighted(q, terms.q_derivative));
    }
    if (want_p) {
      strip.target[i] = p;
      strip.log_ratio[i] = terms.p_derivative;
      sum[6].add(math::weighted(p, terms.p_derivative));
    }
  });
  if (want_q) through_softmax<classes_in_lanes>(strip.input, strip.slope, strip.n, sums[5], scale);
  if (want_p) through_softmax<classes_in_lanes>(strip.target, strip.log_ratio, strip.n, sums[6], scale);
  return formula.total(sums[0], sums[1] / sums[3], sums[2] / sums[4]);
}

// All that one strip needs. The gradients come out multiplied by `scale` / T, and by `hard_scale` the part of the
// hard labels.
template <bool classes_in_lanes, Divergence divergence, class V>
KDKERNELS_INLINE StripResult<V> process_strip(const Strip<V>& strip, const StripOptions<Scalar<V>>& options, V scale,
                                              V hard_scale) {
  StripResult<V> result;
  const V max_s = row_maximum<classes_in_lanes>(strip.input, strip.n);
  V hard_sum{};
  if (options.labels) result.cross_entropy = hard_label_term<classes_in_lanes>(strip, max_s, hard_sum);
  const bool want_s = options.want_input_gradient, want_t = options.want_target_gradient;
  scale = scale * options.inverse_temperature;
  if (options.divergence) {
    const V max_t = row_maximum<classes_in_lanes>(strip.target, strip.n);
    const auto pair = softmax_pair<classes_in_lanes>(strip, max_s, max_t, options.inverse_temperature);
    if constexpr (divergence == Divergence::kl) {
      result.divergence = kl_strip<classes_in_lanes>(strip, pair, options.reverse, options.reverse ? want_t : want_s,
                                                     options.reverse ? want_s : want_t, scale);
    } else if constexpr (divergence == Divergence::js) {
      const math::JensenShannon<V> formula(options.beta);
      result.divergence = pair_strip<classes_in_lanes>(strip, pair, formula, want_s, want_t, scale);
    } else {
      const math::ClampedJensenShannon<V> formula{};
      result.divergence = pair_strip<classes_in_lanes>(strip, pair, formula, want_s, want_t, scale);
    }
  } else {
    for (int64_t i = 0; i < strip.n; ++i) strip.input[i] = strip.target[i] = V{};
  }
  if (options.labels && want_s) {
    const V factor = hard_scale / hard_sum;
    for (int64_t i = 0; i < strip.n; ++i) strip.input[i] = strip.input[i] + strip.hard[i] * factor;
  }
  return result;
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
