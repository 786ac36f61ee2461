// The passes over a group of positions, from the logits to the divergence and the gradients.
#pragma once

#include <utility>

#include "softmax_divergence/cpu_group.h"
#include "softmax_divergence/cpu_labels.h"
#include "softmax_divergence/cpu_parts.h"
#include "softmax_divergence/math.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

template <class S>
struct SoftmaxOptions {
  const SoftmaxCall* call;
  bool general_labels, parts;
  bool probabilities;  // whether the teacher is given by its probabilities, or their logarithms
  S inverse_temperature;
  S beta;
  bool reverse;     // KL(q || p) instead of KL(p || q)
  bool labels;      // also the cross-entropy of the student
  bool divergence;  // false where its weight is 0
  bool want_input_gradient, want_target_gradient;
};

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void find_maxima(Group<classes_in_lanes, V>& group) {
  for (int k = 0; k < group.strips; ++k) {
    const auto input = group.reader(group.student, k), target = group.reader(group.teacher, k);
    V max_s = input(0), max_t = target(0);
    for (int64_t i = 1; i < group.vectors; ++i) {
      max_s = math::maximum(max_s, input(i));
      max_t = math::maximum(max_t, target(i));
    }
    group.gather_maximum(group.max_s, k, max_s);
    group.gather_maximum(group.max_t, k, max_t);
  }
}

// Computes the numerators of both softmaxes in place of the logits, and log_ratio. With labels, also the numerators of
// the student's softmax at T = 1. ahead(k) is called before strip k, to prefetch memory.
template <bool labels, bool classes_in_lanes, class V, class Ahead>
KDKERNELS_INLINE void find_numerators(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature,
                                      const Ahead& ahead) {
  using I = Scalar<Bits<V>>;
  const Bits<V> first = classes_in_lanes ? lane_numbers<V>() : Bits<V>{};
  for (int k = 0; k < group.strips; ++k) {
    ahead(k);
    const Strip<V> strip = group.strip(k);
    const V max_s = group.spread(group.max_s, k), max_t = group.spread(group.max_t, k);
    const math::LogitDifference<V> logit_difference(max_s, max_t);
    const Bits<V> label = group.spread(group.label, k);
    const auto input = group.reader(group.student, k), target = group.reader(group.teacher, k);
    Bits<V> index = first;
    V sums[labels ? 3 : 2];
    for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
      const V z_s = input(i), z_t = target(i);
      strip.log_ratio[i] = logit_difference(z_s, z_t);
      const V shifted = z_s - max_s;
      const V numerator_s = math::exp_nonpositive(shifted * inverse_temperature);
      const V numerator_t = math::exp_nonpositive((z_t - max_t) * inverse_temperature);
      strip.input[i] = numerator_s;
      strip.target[i] = numerator_t;
      sum[0].add(numerator_s);
      sum[1].add(numerator_t);
      if constexpr (labels) {
        const Bits<V> at_label = index == label;
        index = index + I(classes_in_lanes ? lanes<V> : 1);
        const V numerator = math::exp_nonpositive(shifted);
        const V other = select(at_label, V{}, numerator);
        strip.hard[i] = other;
        sum[2].add(other);
      }
    });
    group.gather_sum(group.sum_s, k, sums[0]);
    group.gather_sum(group.sum_t, k, sums[1]);
    if constexpr (labels) group.gather_sum(group.hard_others, k, sums[2]);
  }
}

// Computes the cross-entropy, and prepares its gradient: hard / (others + e^z_y), with -others at the label.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void find_cross_entropy(Group<classes_in_lanes, V>& group) {
  using S = Scalar<V>;
  const V label_logit = group.label_logit - group.max_s;
  const V others = group.hard_others, label = math::exp_nonpositive(label_logit);
  group.cross_entropy = math::cross_entropy(others, label, label_logit);
  group.hard_scale = group.hard_scale / (others + label);
  for_each_label(group,
                 [&](int l, int k, int64_t at) { reinterpret_cast<S*>(group.strip(k).hard)[at] = -lane(others, l); });
}

// Writes gradient(i) for the classes of strip k, and adds the part of the hard labels if `with_hard`.
template <bool with_hard, bool classes_in_lanes, class V, class Gradient>
KDKERNELS_INLINE void write_gradient(const Group<classes_in_lanes, V>& group, int k, const Side<V>& side,
                                     const Gradient& gradient) {
  const V* const hard = group.strip(k).hard;
  const V factor = group.spread(group.hard_scale, k);
  const auto all_of_it = [&](int64_t i) {
    if constexpr (with_hard) {
      return gradient(i) + hard[i] * factor;
    } else {
      return gradient(i);
    }
  };
  Scalar<V>* const destination = side.gradient[k];
  const int64_t whole = side.whole;
  for (int64_t i = 0; i < whole; ++i) store(destination + i * lanes<V>, all_of_it(i));
  if (side.rest > 0) store_part(destination + whole * lanes<V>, all_of_it(whole), side.rest);
}

// Writes probability * (derivative - mean derivative) * scale as the gradient of one side; pick(strip) gives the arrays
// of probabilities and derivatives. At positions that are `dropped` the gradient is 0. `mean` is a rounded mean; its
// error is found from the differences to it, which are exact where they are small.
template <bool with_hard, bool classes_in_lanes, class V, class Pick>
KDKERNELS_INLINE void through_softmax(const Group<classes_in_lanes, V>& group, const V& mean, const V& scale,
                                      const Bits<V>& dropped, const Side<V>& side, const Pick& pick) {
  V rests{};
  for (int k = 0; k < group.strips; ++k) {
    const std::pair<V*, V*> arrays = pick(group.strip(k));
    const V *const probability = arrays.first, *const derivative = arrays.second;
    const V mean_here = group.spread(mean, k);
    V rest[1];
    for_each_with_sums(group.vectors, rest, [&](int64_t i, auto& sums) {
      sums[0].add(math::weighted(probability[i], derivative[i] - mean_here));
    });
    group.gather_sum(rests, k, rest[0]);
  }
  for (int k = 0; k < group.strips; ++k) {
    const std::pair<V*, V*> arrays = pick(group.strip(k));
    const V *const probability = arrays.first, *const derivative = arrays.second;
    const V mean_here = group.spread(mean, k), rest = group.spread(rests, k), scale_here = group.spread(scale, k);
    const Bits<V> drop = group.spread(dropped, k);
    write_gradient<with_hard>(group, k, side, [&](int64_t i) {
      return select(drop, V{}, math::weighted(probability[i], (derivative[i] - mean_here) - rest) * scale_here);
    });
  }
}

// KL(p || q): q is the student's and p the teacher's distribution, or the other way round if `reversed`.
template <bool labels, bool reversed, bool classes_in_lanes, class V>
KDKERNELS_INLINE void finish_kl(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options) {
  using Formula = math::KullbackLeibler<V>;
  const V one = splat<V>(1);
  const bool want_q = reversed ? options.want_target_gradient : options.want_input_gradient;
  const bool want_p = reversed ? options.want_input_gradient : options.want_target_gradient;
  const V sum_q = reversed ? group.sum_t : group.sum_s, sum_p = reversed ? group.sum_s : group.sum_t;
  const V inverse_q = one / sum_q, inverse_p = one / sum_p, log_sums = math::log_positive(sum_p / sum_q);
  const Scalar<V> inverse_temperature = reversed ? -options.inverse_temperature : options.inverse_temperature;
  V shared{}, mean{};
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V* const q = reversed ? strip.target : strip.input;
    V* const p = reversed ? strip.input : strip.target;
    const V inverse_q_here = group.spread(inverse_q, k), inverse_p_here = group.spread(inverse_p, k);
    const V log_sums_here = group.spread(log_sums, k);
    V sums[3];
    const auto log_ratio = [&](int64_t i) { return strip.log_ratio[i] * inverse_temperature - log_sums_here; };
    typename Formula::Begun begun[slots];
    const auto begin = [&](int64_t i, int64_t slot) { begun[slot] = Formula::begin(log_ratio(i)); };
    const auto finish = [&](int64_t i, int64_t slot, auto& sum) {
      const V ratio = log_ratio(i), here_p = p[i] * inverse_p_here;
      const typename Formula::Terms terms = Formula::finish(q[i] * inverse_q_here, here_p, ratio, begun[slot]);
      sum[0].add(terms.value);
      sum[1].add(terms.difference);
      strip.slope[i] = terms.difference;
      if (want_p) {
        p[i] = here_p;
        strip.log_ratio[i] = ratio;
        sum[2].add(math::weighted(here_p, ratio));
      }
    };
    for_each_in_steps(group.vectors, sums, finish, begin);
    group.gather_sum(group.divergence, k, sums[0]);
    group.gather_sum(shared, k, sums[1]);
    group.gather_sum(mean, k, sums[2]);
  }
  const V scale = group.scale * options.inverse_temperature;
  if (want_q) {
    // The differences sum to 0 up to an error that all log-ratios share, which is removed here.
    shared = shared * inverse_q;
    for (int k = 0; k < group.strips; ++k) {
      const Strip<V> strip = group.strip(k);
      const V* const q = reversed ? strip.target : strip.input;
      const V shared_here = group.spread(shared, k), scale_here = group.spread(scale, k);
      write_gradient<labels && !reversed>(group, k, reversed ? group.teacher : group.student, [&](int64_t i) {
        return (strip.slope[i] - q[i] * shared_here) * scale_here;
      });
    }
  }
  if (want_p) {
    // At KL = +inf there is no direction to follow: the gradient is 0.
    const Bits<V> unbounded = group.divergence == math::infinity<V>;
    mean = select(unbounded, V{}, mean);
    through_softmax<labels && reversed>(
        group, mean, scale, unbounded, reversed ? group.student : group.teacher,
        [](const Strip<V>& strip) { return std::pair(reversed ? strip.input : strip.target, strip.log_ratio); });
  }
}

// A divergence that is a sum over the classes of math::PairTerms
template <bool labels, bool classes_in_lanes, class V, class Formula>
KDKERNELS_INLINE void finish_pair(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                  const Formula& formula) {
  const bool want_q = options.want_input_gradient, want_p = options.want_target_gradient;
  const V one = splat<V>(1);
  const V inverse_q = one / group.sum_s, inverse_p = one / group.sum_t;
  const V log_sums = math::log_ratio_of_sums(group.sum_t, group.sum_s);
  const Scalar<V> inverse_temperature = options.inverse_temperature;
  V value{}, far_q{}, far_p{}, sum_q{}, sum_p{}, mean_q{}, mean_p{};
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V inverse_q_here = group.spread(inverse_q, k), inverse_p_here = group.spread(inverse_p, k);
    const V log_sums_here = group.spread(log_sums, k);
    V sums[7];
    const auto log_ratio = [&](int64_t i) { return strip.log_ratio[i] * inverse_temperature - log_sums_here; };
    typename Formula::Begun begun[slots];
    const auto begin = [&](int64_t i, int64_t slot) { begun[slot] = formula.begin(log_ratio(i)); };
    const auto go_on = [&](int64_t i, int64_t slot) { formula.go_on(log_ratio(i), begun[slot]); };
    const auto finish = [&](int64_t i, int64_t slot, auto& sum) {
      const V q = strip.input[i] * inverse_q_here, p = strip.target[i] * inverse_p_here;
      const math::PairTerms<V> terms = formula.finish(q, p, log_ratio(i), begun[slot]);
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
    };
    for_each_in_steps(group.vectors, sums, finish, begin, go_on);
    group.gather_sum(value, k, sums[0]);
    group.gather_sum(far_q, k, sums[1]);
    group.gather_sum(far_p, k, sums[2]);
    group.gather_sum(sum_q, k, sums[3]);
    group.gather_sum(sum_p, k, sums[4]);
    group.gather_sum(mean_q, k, sums[5]);
    group.gather_sum(mean_p, k, sums[6]);
  }
  group.divergence = formula.total(value, far_q / sum_q, far_p / sum_p);
  const V scale = group.scale * inverse_temperature;
  if (want_q) {
    through_softmax<labels>(group, mean_q, scale, Bits<V>{}, group.student,
                            [](const Strip<V>& strip) { return std::pair(strip.input, strip.slope); });
  }
  if (want_p) {
    through_softmax<false>(group, mean_p, scale, Bits<V>{}, group.teacher,
                           [](const Strip<V>& strip) { return std::pair(strip.target, strip.log_ratio); });
  }
}

// Runs all passes over a group. The gradients are multiplied by `scale` / T, and the part of the labels by
// `hard_scale`. `first` is the position of the first lane.
template <Divergence divergence, bool labels, bool classes_in_lanes, class V, class Ahead>
KDKERNELS_INLINE void process_group(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                    int64_t first, int count, const Ahead& ahead) {
  find_maxima(group);
  if (options.probabilities) group.max_t = select(group.max_t == -math::infinity<V>, V{}, group.max_t);
  if (options.parts) find_parts(group, options.inverse_temperature);
  if constexpr (labels) {
    if (options.general_labels) {
      begin_general_labels(group, *options.call, first, count);
    } else {
      group.label_logit = group.max_s;  // where there is no label
      for_each_label(group,
                     [&](int l, int k, int64_t at) { set_lane(group.label_logit, l, group.student.logits[k][at]); });
    }
  }
  find_numerators<labels>(group, options.inverse_temperature, ahead);
  if constexpr (labels) {
    if (options.general_labels) {
      finish_general_labels(group, *options.call);
    } else {
      find_cross_entropy(group);
    }
  }
  const bool any_sum = divergence == Divergence::kl && options.probabilities && options.call->any_sum;
  if (options.probabilities) begin_mass(group, options.inverse_temperature, any_sum);
  if (!options.divergence) {
    const V zero{};
    for (int k = 0; k < group.strips; ++k) {
      if (options.want_input_gradient) write_gradient<labels>(group, k, group.student, [&](int64_t) { return zero; });
      if (options.want_target_gradient) write_gradient<false>(group, k, group.teacher, [&](int64_t) { return zero; });
    }
  } else if constexpr (divergence == Divergence::js) {
    finish_pair<labels>(group, options, math::JensenShannon<V>(options.beta));
  } else if constexpr (divergence == Divergence::clamped_js) {
    finish_pair<labels>(group, options, math::ClampedJensenShannon<V>());
  } else if (options.reverse) {
    finish_kl<labels, true>(group, options);
  } else {
    finish_kl<labels, false>(group, options);
  }
  if (any_sum) group.divergence = times_mass(group.mass, group.divergence, group.log_mass);
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
