// The derivatives of the divergences of a tile by the temperature, for a temperature that is learned. The logits of the
// tile are read again, from cache, and both softmaxes computed again: this is rare, and the other passes stay lean.
//
// K depends on z / T alone, so T dK/dT = -(sum s dK/ds + sum t dK/dt) with s and t the logits relative to the maximum
// of their row and divided by T: the derivatives of a row sum to 0, hence the maximum does not matter.
#pragma once

#include "softmax_divergence/cpu_passes.h"
#include "softmax_divergence/cpu_tiles.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Keeps s in `hard` and t in `slope`, which have no other use here, and computes the numerators in place of the logits.
// A class with a logit of -inf has no probability and no derivative: it gets 0.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void keep_logits(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature) {
  find_maxima(group);
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V max_s = group.spread(group.max_s, k), max_t = group.spread(group.max_t, k);
    const auto input = group.reader(group.student, k), target = group.reader(group.teacher, k);
    const auto finite = [](V x) { return select(x == -math::infinity<V>, V{}, x); };
    for (int64_t i = 0; i < group.vectors; ++i) {
      strip.hard[i] = finite((input(i) - max_s) * inverse_temperature);
      strip.slope[i] = finite((target(i) - max_t) * inverse_temperature);
    }
  }
  find_numerators<false>(group, inverse_temperature, [](int) {});
}

// Returns -T dK/dT of K = KL(p || q), or of KL(q || p) if `reversed`, and sets the divergence. With r = ln(p/q), v the
// terms of the divergence, and t = s + r + a constant, the two sums become sum s (v - p K) + sum p (r - mean r)^2: all
// of second order in r, so that nothing cancels where teacher and student nearly agree.
template <bool reversed, bool classes_in_lanes, class V>
KDKERNELS_INLINE V differentiate_kl(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature) {
  using Formula = math::KullbackLeibler<V>;
  const V one = splat<V>(1);
  const V sum_q = reversed ? group.sum_t : group.sum_s, sum_p = reversed ? group.sum_s : group.sum_t;
  const V inverse_q = one / sum_q, inverse_p = one / sum_p, log_sums = math::log_positive(sum_p / sum_q);
  const Scalar<V> factor = reversed ? -inverse_temperature : inverse_temperature;
  const auto for_each_class = [&](int k, auto& sums, const auto& body) {
    const Strip<V> strip = group.strip(k);
    const V* const q = reversed ? strip.target : strip.input;
    const V* const p = reversed ? strip.input : strip.target;
    const V inverse_q_here = group.spread(inverse_q, k), inverse_p_here = group.spread(inverse_p, k);
    const V log_sums_here = group.spread(log_sums, k);
    for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
      const V ratio = strip.log_ratio[i] * factor - log_sums_here, here_p = p[i] * inverse_p_here;
      body(i, sum, Formula::finish(q[i] * inverse_q_here, here_p, ratio, Formula::begin(ratio)).value, here_p, ratio);
    });
  };
  V mean{}, result{};
  for (int k = 0; k < group.strips; ++k) {
    V sums[2];
    for_each_class(k, sums, [&](int64_t, auto& sum, V value, V p, V ratio) {
      sum[0].add(value);
      sum[1].add(math::weighted(p, ratio));
    });
    group.gather_sum(group.divergence, k, sums[0]);
    group.gather_sum(mean, k, sums[1]);
  }
  for (int k = 0; k < group.strips; ++k) {
    const V* const s = reversed ? group.strip(k).slope : group.strip(k).hard;
    const V divergence = group.spread(group.divergence, k), mean_here = group.spread(mean, k);
    V sums[1];
    for_each_class(k, sums, [&](int64_t i, auto& sum, V value, V p, V ratio) {
      const V distance = ratio - mean_here;
      sum[0].add(s[i] * (value - p * divergence) + math::weighted(p, distance * distance));
    });
    group.gather_sum(result, k, sums[0]);
  }
  // At K = +inf there is no direction to follow: the derivative is 0, as the gradients of the weighting side are.
  return select(group.divergence == math::infinity<V>, V{}, result);
}

// The same for a divergence that is a sum over the classes of math::PairTerms
template <bool classes_in_lanes, class V, class Formula>
KDKERNELS_INLINE V differentiate_pair(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature,
                                      const Formula& formula) {
  const V one = splat<V>(1);
  const V inverse_q = one / group.sum_s, inverse_p = one / group.sum_t;
  const V log_sums = math::log_ratio_of_sums(group.sum_t, group.sum_s);
  const auto for_each_class = [&](int k, auto& sums, const auto& body) {
    const Strip<V> strip = group.strip(k);
    const V inverse_q_here = group.spread(inverse_q, k), inverse_p_here = group.spread(inverse_p, k);
    const V log_sums_here = group.spread(log_sums, k);
    for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
      const V q = strip.input[i] * inverse_q_here, p = strip.target[i] * inverse_p_here;
      const V ratio = strip.log_ratio[i] * inverse_temperature - log_sums_here;
      typename Formula::Begun begun = formula.begin(ratio);
      formula.go_on(ratio, begun);
      body(i, sum, q, p, formula.finish(q, p, ratio, begun));
    });
  };
  V value{}, far_q{}, far_p{}, sum_q{}, sum_p{}, mean_q{}, mean_p{}, result{};
  for (int k = 0; k < group.strips; ++k) {
    V sums[7];
    for_each_class(k, sums, [&](int64_t, auto& sum, V q, V p, const math::PairTerms<V>& terms) {
      sum[0].add(terms.value);
      sum[1].add(terms.far_q);
      sum[2].add(terms.far_p);
      sum[3].add(q);
      sum[4].add(p);
      sum[5].add(math::weighted(q, terms.q_derivative));
      sum[6].add(math::weighted(p, terms.p_derivative));
    });
    V* const of_position[] = {&value, &far_q, &far_p, &sum_q, &sum_p, &mean_q, &mean_p};
    for (int n = 0; n < 7; ++n) group.gather_sum(*of_position[n], k, sums[n]);
  }
  group.divergence = formula.total(value, far_q / sum_q, far_p / sum_p);
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    const V mean_q_here = group.spread(mean_q, k), mean_p_here = group.spread(mean_p, k);
    V sums[1];
    for_each_class(k, sums, [&](int64_t i, auto& sum, V q, V p, const math::PairTerms<V>& terms) {
      sum[0].add(strip.hard[i] * math::weighted(q, terms.q_derivative - mean_q_here) +
                 strip.slope[i] * math::weighted(p, terms.p_derivative - mean_p_here));
    });
    group.gather_sum(result, k, sums[0]);
  }
  return result;
}

// Writes the derivatives of the divergence of each position of a tile by T, and the divergence, its derivative by the
// weight.
template <bool classes_in_lanes, Divergence divergence, class V>
[[gnu::noinline]] void differentiate_by_scalars(const SoftmaxCall& call, const SoftmaxOptions<Scalar<V>>& options,
                                                const Tile& tile, Scalar<V>* scratch) {
  using S = Scalar<V>;
  read_logits<classes_in_lanes, V>(call, tile, scratch);
  V* memory = reinterpret_cast<V*>(scratch);
  S* const by_temperature = static_cast<S*>(call.scalar_gradients) + tile.first;
  S* const by_weight = by_temperature + call.positions;
  for (int64_t start = 0; start < tile.count; start += lanes<V>) {
    Group<classes_in_lanes, V> group = group_at<classes_in_lanes, V>(tile, start, memory);
    keep_logits(group, options.inverse_temperature);
    V result;
    if constexpr (divergence == Divergence::js) {
      result = differentiate_pair(group, options.inverse_temperature, math::JensenShannon<V>(options.beta));
    } else if constexpr (divergence == Divergence::clamped_js) {
      result = differentiate_pair(group, options.inverse_temperature, math::ClampedJensenShannon<V>());
    } else if (options.reverse) {
      result = differentiate_kl<true>(group, options.inverse_temperature);
    } else {
      result = differentiate_kl<false>(group, options.inverse_temperature);
    }
    const int64_t rest = tile.count - start, count = rest < lanes<V> ? rest : lanes<V>;
    for (int64_t l = 0; l < count; ++l) {
      by_temperature[start + l] = -lane(result, int(l)) * options.inverse_temperature;
      by_weight[start + l] = lane(group.divergence, int(l));
    }
    memory += group.strips * Strip<V>::arrays * group.vectors;
  }
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
