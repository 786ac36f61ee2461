// The passes of the losses that are neither a Kullback-Leibler nor a Jensen-Shannon divergence. All of them share one
// instance of the code around the passes, which chooses among them when it runs.
#pragma once

#include "softmax_divergence/cpu_decoupled.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// The entropy of the student: with s = z / T relative to the maximum, ln sum e^s - sum q s, whose derivative by s is
// -q (s - sum q s).
template <bool classes_in_lanes, class V, class Ahead>
[[gnu::noinline]] void process_entropy(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                       const Ahead& ahead) {
  V sum{}, mean{};
  for (int k = 0; k < group.strips; ++k) {
    ahead(k);
    const Strip<V> strip = group.strip(k);
    const V largest = group.spread(group.max_s, k);
    const auto input = group.reader(group.student, k);
    V sums[2];
    for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
      const V s = (input(i) - largest) * options.inverse_temperature;
      const V numerator = math::exp_nonpositive(s);
      strip.input[i] = numerator;
      strip.slope[i] = s;
      sum[0].add(numerator);
      sum[1].add(math::weighted(numerator, s));
    });
    group.gather_sum(sum, k, sums[0]);
    group.gather_sum(mean, k, sums[1]);
  }
  mean = mean / sum;
  group.divergence = math::log_positive(sum) - mean;
  if (!options.want_input_gradient) return;
  const V scale = group.scale * options.inverse_temperature / sum;
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V mean_here = group.spread(mean, k), scale_here = group.spread(scale, k);
    write_gradient<false>(group, k, group.student, [&](int64_t i) {
      return math::weighted(strip.input[i], mean_here - strip.slope[i]) * scale_here;
    });
  }
}

// A loss of both sides without labels
template <bool classes_in_lanes, class V, class Ahead>
[[gnu::noinline]] void process_pair(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                    const Ahead& ahead) {
  const OtherLoss loss = options.call->other;
  V cross{};
  if (loss == OtherLoss::soft_cross_entropy) {
    V unused;
    cross = find_soft_numerators<false>(group, options.inverse_temperature, unused, unused, ahead);
  } else {
    find_numerators<false>(group, options.inverse_temperature, ahead);
  }
  if (options.probabilities) begin_mass(group, options.inverse_temperature, options.call->any_sum);
  if (loss == OtherLoss::soft_cross_entropy) {
    group.divergence = soft_cross_entropy(group.sum_s, group.sum_t, cross);
    if (options.probabilities) group.divergence = times_mass(group.mass, group.divergence, V{});
    if (options.want_input_gradient) write_soft_gradient(group, options.inverse_temperature);
  } else if (loss == OtherLoss::skew_kl && options.beta == Scalar<V>(1)) {  // compares a distribution with itself
    const auto nothing = [](int64_t) { return V{}; };
    for (int k = 0; k < group.strips; ++k) {
      if (options.want_input_gradient) write_gradient<false>(group, k, group.student, nothing);
      if (options.want_target_gradient) write_gradient<false>(group, k, group.teacher, nothing);
    }
  } else if (loss == OtherLoss::skew_kl) {
    finish_pair<false>(group, options, math::SkewKullbackLeibler<V>(options.beta, options.reverse));
  } else {
    finish_pair<false>(group, options, math::TotalVariationDistance<V>());
  }
}

// Runs all passes over a group for a loss that has no instance of its own.
template <bool classes_in_lanes, class V, class Ahead>
KDKERNELS_INLINE void process_other(Group<classes_in_lanes, V>& group, const SoftmaxOptions<Scalar<V>>& options,
                                    const Ahead& ahead) {
  find_maxima(group);
  if (options.probabilities) group.max_t = select(group.max_t == -math::infinity<V>, V{}, group.max_t);
  if (options.parts) find_parts(group, options.inverse_temperature);
  switch (options.call->other) {
    case OtherLoss::decoupled:
      return process_decoupled(group, options, ahead);
    case OtherLoss::normalized:
      return process_normalized(group, options, ahead);
    case OtherLoss::entropy:
      return process_entropy(group, options, ahead);
    default:
      return process_pair(group, options, ahead);
  }
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
