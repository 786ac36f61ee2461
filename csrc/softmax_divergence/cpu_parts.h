// What is asked for beside the loss: the sum of a teacher's probabilities, its entropy, and whether the largest logits
// of both sides are at the same class.
#pragma once

#include "softmax_divergence/cpu_group.h"
#include "softmax_divergence/math.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// The index of the first class with the largest logit, for each position
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE Bits<V> first_largest(const Group<classes_in_lanes, V>& group, const Side<V>& side, const V& maxima) {
  using I = Scalar<Bits<V>>;
  Bits<V> result{};
  for (int k = 0; k < group.strips; ++k) {
    const auto logits = group.reader(side, k);
    const V largest = group.spread(maxima, k);
    Bits<V> index = classes_in_lanes ? lane_numbers<V>() : Bits<V>{};
    Bits<V> found = Bits<V>{} + std::numeric_limits<I>::max();
    for (int64_t i = 0; i < group.vectors; ++i) {
      const auto here = Bits<V>(logits(i) == largest) & Bits<V>(index < found);
      found = select(here, index, found);
      index = index + I(classes_in_lanes ? lanes<V> : 1);
    }
    if constexpr (classes_in_lanes) {
      const I* const of_lanes = reinterpret_cast<const I*>(&found);
      I least = of_lanes[0];
      for (int l = 1; l < lanes<V>; ++l) least = of_lanes[l] < least ? of_lanes[l] : least;
      reinterpret_cast<I*>(&result)[k] = least;
    } else {
      result = found;
    }
  }
  return result;
}

// Sets the teacher's entropy, as far as its probabilities sum to 1, and the agreement of the largest logits.
template <bool classes_in_lanes, class V>
[[gnu::noinline]] void find_parts(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature) {
  const auto agree =
      first_largest(group, group.student, group.max_s) == first_largest(group, group.teacher, group.max_t);
  group.agreement = select(Bits<V>(agree), splat<V>(1), V{});
  V total{}, mean{};
  for (int k = 0; k < group.strips; ++k) {
    const auto target = group.reader(group.teacher, k);
    const V largest = group.spread(group.max_t, k);
    V sums[2];
    for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
      const V scaled = (target(i) - largest) * inverse_temperature;
      const V numerator = math::exp_nonpositive(scaled);
      sum[0].add(numerator);
      sum[1].add(math::weighted(numerator, scaled));
    });
    group.gather_sum(total, k, sums[0]);
    group.gather_sum(mean, k, sums[1]);
  }
  group.entropy = math::log_positive(total) - mean / total;
}

// M times the result for p/M and a share of ln M: KL(p || q) = M (KL(p/M || q) + ln M), H(p) = M (H(p/M) - ln M).
template <class V>
KDKERNELS_INLINE V times_mass(const V& mass, const V& normalized, const V& log_mass) {
  return select(mass == Scalar<V>(0), V{}, mass * (normalized + log_mass));
}

// Finds M, the sum of a teacher's probabilities, 0 without any probability, and applies it to the entropy; with
// `any_sum` also to the gradient of KL(p || q).
template <bool classes_in_lanes, class V>
[[gnu::noinline]] void begin_mass(Group<classes_in_lanes, V>& group, Scalar<V> inverse_temperature, bool any_sum) {
  const auto nothing = group.sum_t == Scalar<V>(0);
  group.sum_t = select(nothing, splat<V>(1), group.sum_t);
  const V log_mass = group.max_t * inverse_temperature + math::log_positive(group.sum_t);
  const V smaller = math::exp_nonpositive(-math::absolute(log_mass));
  const V mass = select(log_mass > Scalar<V>(0), splat<V>(1) / smaller, smaller);
  group.mass = select(nothing, V{}, mass);
  group.log_mass = select(nothing, splat<V>(-math::infinity<V>), log_mass);
  group.entropy = times_mass(group.mass, group.entropy, -group.log_mass);
  if (any_sum) group.scale = group.scale * group.mass;
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
