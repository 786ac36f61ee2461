// The cross-entropy of the student with the teacher: one pass finds the numerators and the value, another writes the
// gradient.
#pragma once

#include "softmax_divergence/cpu_passes.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Whether q - p is found from the difference of the logits. In 64 bits no wider type hides what the exponentials of an
// old processor, without fused multiplications, round off where both sides are close.
template <class V>
inline constexpr bool differences_of_logits = sizeof(Scalar<V>) == 8;

// Computes the numerators of both softmaxes in place of the logits. Returns sum e^t s, which is -inf if a class that
// the teacher has is missing in the student. If `at_one`, also the student's numerators at T = 1, and both their sums.
template <bool at_one, bool classes_in_lanes, class V, class Ahead>
KDKERNELS_INLINE V find_soft_numerators(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature,
                                        V& sum_s_at_one, V& sum_t_at_one, const Ahead& ahead) {
  V cross{};
  for (int k = 0; k < group.strips; ++k) {
    ahead(k);
    const Strip<V> strip = group.strip(k);
    const V max_s = group.spread(group.max_s, k), max_t = group.spread(group.max_t, k);
    const math::LogitDifference<V> logit_difference(max_s, max_t);
    const auto input = group.reader(group.student, k), target = group.reader(group.teacher, k);
    V sums[at_one ? 5 : 3];
    for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
      if constexpr (differences_of_logits<V>) strip.log_ratio[i] = logit_difference(input(i), target(i));
      const V shifted_s = input(i) - max_s, shifted_t = target(i) - max_t;
      const V s = shifted_s * inverse_temperature;
      const V numerator_s = math::exp_nonpositive(s);
      const V numerator_t = math::exp_nonpositive(shifted_t * inverse_temperature);
      strip.input[i] = numerator_s;
      strip.target[i] = numerator_t;
      sum[0].add(numerator_s);
      sum[1].add(numerator_t);
      sum[2].add(math::weighted(numerator_t, s));
      if constexpr (at_one) {
        const V numerator = math::exp_nonpositive(shifted_s);
        strip.hard[i] = numerator;
        sum[3].add(numerator);
        sum[4].add(math::exp_nonpositive(shifted_t));
      }
    });
    group.gather_sum(group.sum_s, k, sums[0]);
    group.gather_sum(group.sum_t, k, sums[1]);
    group.gather_sum(cross, k, sums[2]);
    if constexpr (at_one) {
      group.gather_sum(sum_s_at_one, k, sums[3]);
      group.gather_sum(sum_t_at_one, k, sums[4]);
    }
  }
  return cross;
}

// -sum p ln q. The teacher's numerators may all be 0, where the result is 0.
template <class V>
KDKERNELS_INLINE V soft_cross_entropy(const V& sum_s, const V& sum_t, const V& cross) {
  return select(sum_t == Scalar<V>(0), V{}, math::log_positive(sum_s) - cross / sum_t);
}

template <class V>
KDKERNELS_INLINE V inverse_or_zero(const V& sum) {
  return select(sum == Scalar<V>(0), V{}, splat<V>(1) / sum);
}

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void write_soft_gradient(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature) {
  using Formula = math::KullbackLeibler<V>;
  const V scale = group.scale * inverse_temperature;
  const V inverse_s = splat<V>(1) / group.sum_s, inverse_t = splat<V>(1) / group.sum_t;
  const V log_sums = math::log_positive(group.sum_t / group.sum_s);
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V inverse_s_here = group.spread(inverse_s, k), inverse_t_here = group.spread(inverse_t, k);
    const V log_sums_here = group.spread(log_sums, k), scale_here = group.spread(scale, k);
    write_gradient<false>(group, k, group.student, [&](int64_t i) {
      const V q = strip.input[i] * inverse_s_here, p = strip.target[i] * inverse_t_here;
      if constexpr (differences_of_logits<V>) {
        const V log_ratio = strip.log_ratio[i] * inverse_temperature - log_sums_here;
        return Formula::finish(q, p, log_ratio, Formula::begin(log_ratio)).difference * scale_here;
      } else {
        return (q - p) * scale_here;
      }
    });
  }
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
