// The passes of the losses that treat the class of the label apart from the others. The logits of the label are taken
// out of the rows, so that all sums are over the other classes; about the label there are its log-odds, which need no
// more than these sums.
#pragma once

#include "softmax_divergence/cpu_soft_cross_entropy.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// One side of the class of the label
template <class V>
struct LabelSide {
  V logit{};

  // ln((1 - q_y) / q_y), given the maximum of the other classes and the sum of their numerators
  KDKERNELS_INLINE V odds(const V& largest, const V& sum, Scalar<V> inverse_temperature) const {
    const V log = select(sum == Scalar<V>(0), splat<V>(-math::infinity<V>), math::log_positive(sum));
    return (largest - logit) * inverse_temperature + log;
  }
};

// Takes the logits of the label out of both sides, which lie in scratch memory.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void take_out_labels(Group<classes_in_lanes, V>& group, LabelSide<V>& student, LabelSide<V>& teacher) {
  using S = Scalar<V>;
  for_each_label(group, [&](int l, int k, int64_t at) {
    const Strip<V> strip = group.strip(k);
    S &of_s = reinterpret_cast<S*>(strip.input)[at], &of_t = reinterpret_cast<S*>(strip.target)[at];
    set_lane(student.logit, l, of_s);
    set_lane(teacher.logit, l, of_t);
    of_s = of_t = -math::infinity<V>;
  });
  find_maxima(group);
  const V none = splat<V>(-math::infinity<V>);
  group.max_s = select(group.max_s == none, V{}, group.max_s);
  group.max_t = select(group.max_t == none, V{}, group.max_t);
}

// Makes maximum and sum those of all classes again, for the parts of the loss.
template <class V>
KDKERNELS_INLINE void put_back(const LabelSide<V>& side, V& largest, V& sum, Scalar<V> inverse_temperature) {
  const V of_others = select(sum > Scalar<V>(0), largest, side.logit), together = math::maximum(of_others, side.logit);
  const V others = math::weighted(sum, math::exp_nonpositive((of_others - together) * inverse_temperature));
  sum = others + math::exp_nonpositive((side.logit - together) * inverse_temperature);
  largest = together;
}

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void write_label_gradient(Group<classes_in_lanes, V>& group, const V& gradient) {
  for_each_label(group, [&](int l, int k, int64_t at) { group.student.gradient[k][at] = lane(gradient, l); });
}

// KL(p || q) of the other classes, as in finish_kl; the gradient gets by_odds times their probabilities on top.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void finish_others(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                    const V& by_odds) {
  using Formula = math::KullbackLeibler<V>;
  using S = Scalar<V>;
  const V inverse_q = inverse_or_zero(group.sum_s), inverse_p = inverse_or_zero(group.sum_t);
  const Bits<V> alone = (group.sum_s == S(0)) | (group.sum_t == S(0));
  const V log_sums = select(alone, V{}, math::log_positive(group.sum_t / group.sum_s));
  V shared{};
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V inverse_q_here = group.spread(inverse_q, k), inverse_p_here = group.spread(inverse_p, k);
    const V log_sums_here = group.spread(log_sums, k);
    V sums[2];
    const auto log_ratio = [&](int64_t i) { return strip.log_ratio[i] * options.inverse_temperature - log_sums_here; };
    typename Formula::Begun begun[slots];
    const auto begin = [&](int64_t i, int64_t slot) { begun[slot] = Formula::begin(log_ratio(i)); };
    const auto finish = [&](int64_t i, int64_t slot, auto& sum) {
      const typename Formula::Terms terms =
          Formula::finish(strip.input[i] * inverse_q_here, strip.target[i] * inverse_p_here, log_ratio(i), begun[slot]);
      sum[0].add(terms.value);
      sum[1].add(terms.difference);
      strip.slope[i] = terms.difference;
    };
    for_each_in_steps(group.vectors, sums, finish, begin);
    group.gather_sum(group.divergence, k, sums[0]);
    group.gather_sum(shared, k, sums[1]);
  }
  // Without a teacher's distribution over the others nothing is compared there.
  const Bits<V> nothing = group.sum_t == S(0);
  group.divergence = select(nothing, V{}, group.divergence);
  if (!options.want_input_gradient) return;
  const V scale = select(nothing, V{}, group.scale * options.inverse_temperature);
  const V of_q = (by_odds - shared * scale) * inverse_q;
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V of_q_here = group.spread(of_q, k), scale_here = group.spread(scale, k);
    write_gradient<false>(group, k, group.student,
                          [&](int64_t i) { return strip.slope[i] * scale_here + strip.input[i] * of_q_here; });
  }
}

template <bool classes_in_lanes, class V, class Ahead>
[[gnu::noinline]] void process_decoupled(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                         const Ahead& ahead) {
  LabelSide<V> student, teacher;
  take_out_labels(group, student, teacher);
  find_numerators<false>(group, options.inverse_temperature, ahead);
  const V a = student.odds(group.max_s, group.sum_s, options.inverse_temperature);
  const V b = teacher.odds(group.max_t, group.sum_t, options.inverse_temperature);
  const V d = ((group.max_s - group.max_t) - (student.logit - teacher.logit)) * options.inverse_temperature +
              math::log_ratio_of_sums(group.sum_s, group.sum_t);
  const math::TargetClassDivergence<V> of_label(a, b, d);
  group.cross_entropy = of_label.value;
  const V by_odds = of_label.difference * group.hard_scale * options.inverse_temperature;
  finish_others(group, options, by_odds);
  if (options.want_input_gradient) write_label_gradient(group, -by_odds);
  if (!options.parts) return;
  put_back(student, group.max_s, group.sum_s, options.inverse_temperature);
  put_back(teacher, group.max_t, group.sum_t, options.inverse_temperature);
}

// -p_y ln q_y at T = 1, and the cross-entropy of the others at T
template <bool classes_in_lanes, class V, class Ahead>
[[gnu::noinline]] void process_normalized(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                          const Ahead& ahead) {
  using S = Scalar<V>;
  LabelSide<V> student, teacher;
  take_out_labels(group, student, teacher);
  const bool at_one = options.inverse_temperature != S(1);
  V sum_s{}, sum_t{}, cross{};
  if (at_one) {
    cross = find_soft_numerators<true>(group, options.inverse_temperature, sum_s, sum_t, ahead);
  } else {
    cross = find_soft_numerators<false>(group, options.inverse_temperature, sum_s, sum_t, ahead);
    sum_s = group.sum_s;
    sum_t = group.sum_t;
  }
  group.divergence = soft_cross_entropy(group.sum_s, group.sum_t, cross);
  const math::Logistic<V> of_student(student.odds(group.max_s, sum_s, S(1)));
  const math::Logistic<V> of_teacher(teacher.odds(group.max_t, sum_t, S(1)));
  group.cross_entropy = math::weighted(of_teacher.rest, of_student.minus_log_rest);
  if (options.want_input_gradient) {
    const V by_odds = of_teacher.rest * of_student.probability * group.hard_scale;
    const V scale = select(group.sum_t == S(0), V{}, group.scale * options.inverse_temperature);
    const V inverse_q = inverse_or_zero(group.sum_s), inverse_p = inverse_or_zero(group.sum_t);
    const V of_label = by_odds * inverse_or_zero(sum_s);
    for (int k = 0; k < group.strips; ++k) {
      const Strip<V> strip = group.strip(k);
      const V* const label_numerators = at_one ? strip.hard : strip.input;
      const V inverse_q_here = group.spread(inverse_q, k), inverse_p_here = group.spread(inverse_p, k);
      const V scale_here = group.spread(scale, k), of_label_here = group.spread(of_label, k);
      write_gradient<false>(group, k, group.student, [&](int64_t i) {
        const V difference = strip.input[i] * inverse_q_here - strip.target[i] * inverse_p_here;
        return difference * scale_here + label_numerators[i] * of_label_here;
      });
    }
    write_label_gradient(group, -by_odds);
  }
  if (!options.parts) return;
  put_back(student, group.max_s, group.sum_s, options.inverse_temperature);
  put_back(teacher, group.max_t, group.sum_t, options.inverse_temperature);
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
