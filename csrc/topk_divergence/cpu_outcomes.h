// The divergence of a position, once the unlisted classes are summed up: the listed classes, and the rest as one more
// outcome. All of it is in double, because the mass of the rest is what a sum near 1 leaves.
#pragma once

#include <cmath>
#include <limits>

#include "topk_divergence/math.h"
#include "topk_divergence/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

using Doubles = Vector<double, KDKERNELS_VECTOR_BYTES>;

// The unlisted classes of the student: the largest logit, and the sum of e^((z - largest) / T)
struct Rest {
  double largest, sum;
};

struct Solution {
  double value, target_mass, input_mass;
  double outside;  // T times the gradient of all unlisted logits together, which share it as they share their mass
};

// The listed classes of a position, in vectors whose unused lanes are padding
struct Outcomes {
  int64_t vectors;
  int64_t listed;  // those that are no padding
  Doubles* logit;  // z / T on entry, then T times the gradient; -inf at padding
  Doubles* log_p;  // on entry, then the gradient of the teacher's values; -inf at padding
  Doubles *p, *q;
};

template <class Body>
KDKERNELS_INLINE double sum_over(const Outcomes& outcomes, const Body& body) {
  Doubles sum{};
  for (int64_t i = 0; i < outcomes.vectors; ++i) sum = sum + body(i);
  return sum_lanes(sum);
}

KDKERNELS_INLINE double largest_of(const Doubles* numbers, int64_t vectors) {
  Doubles largest = numbers[0];
  for (int64_t i = 1; i < vectors; ++i) largest = math::maximum(numbers[i], largest);
  return max_lanes(largest);
}

// Replaces log p by log p - ln(sum of p).
KDKERNELS_INLINE void renormalize_teacher(const Outcomes& outcomes) {
  const double largest = largest_of(outcomes.log_p, outcomes.vectors);
  const double sum = sum_over(outcomes, [&](int64_t i) { return math::exp_nonpositive(outcomes.log_p[i] - largest); });
  const double log_sum = largest + std::log(sum);
  for (int64_t i = 0; i < outcomes.vectors; ++i) outcomes.log_p[i] = outcomes.log_p[i] - log_sum;
}

// Computes a position; with `gradients`, also the gradients, in place of the logits and of log p.
template <bool gradients>
KDKERNELS_INLINE Solution solve(const TopKCall& call, const Outcomes& outcomes, const Rest& rest) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const bool renormalized = call.tail == Tail::renormalize, bucket = call.tail == Tail::bucket;
  const int64_t vectors = outcomes.vectors;
  Solution solution{0, 0, 0, 0};
  if (call.want_masses || !renormalized) {
    solution.target_mass = sum_over(outcomes, [&](int64_t i) { return math::exp_nonpositive(outcomes.log_p[i]); });
  }

  // The student's softmax, over all classes or over the listed ones
  const double rest_logit = rest.largest / call.temperature;
  double shift = largest_of(outcomes.logit, vectors);
  if (!renormalized && rest.sum > 0 && rest_logit > shift) shift = rest_logit;
  if (shift == -infinity) shift = 0;
  const double listed_sum =
      sum_over(outcomes, [&](int64_t i) { return outcomes.q[i] = math::exp_nonpositive(outcomes.logit[i] - shift); });
  const double rest_sum = rest.sum == 0 ? 0 : rest.sum * std::exp(rest_logit - shift);
  solution.input_mass = listed_sum / (listed_sum + rest_sum);
  if (renormalized && outcomes.listed == 0) {
    if constexpr (gradients) {
      for (int64_t i = 0; i < vectors; ++i) outcomes.logit[i] = outcomes.log_p[i] = Doubles{};
    }
    return solution;
  }
  if (renormalized) renormalize_teacher(outcomes);
  const double total = renormalized ? listed_sum : listed_sum + rest_sum, log_total = std::log(total);
  const double q_rest = renormalized ? 0 : rest_sum / total;

  // ln(p / q) and ln(q / p) of the listed classes stay in the place of their logits.
  const double direction = call.reverse ? -1 : 1;
  double value = sum_over(outcomes, [&](int64_t i) {
    const Doubles q = outcomes.q[i] / total, p = math::exp_nonpositive(outcomes.log_p[i]);
    const Doubles log_q = (outcomes.logit[i] - shift) - log_total;
    const Doubles log_ratio = (outcomes.log_p[i] - log_q) * direction;
    outcomes.p[i] = p;
    outcomes.q[i] = q;
    outcomes.logit[i] = log_ratio;
    return call.reverse ? math::divergence_term(q, p, log_ratio) : math::divergence_term(p, q, log_ratio);
  });

  // The rest as one more outcome; without unlisted classes there is none.
  double p_rest = 0, rest_ratio = 0, p_sum = renormalized ? 1 : solution.target_mass;
  double q_sum = renormalized ? 1 : listed_sum / total;
  if (bucket) {
    if (outcomes.listed < call.classes && p_sum < 1) p_rest = 1 - p_sum;
    if (p_rest > 0) p_sum = 1;
    q_sum = 1;
    const double log_q_rest = rest_logit + std::log(rest.sum) - shift - log_total;
    rest_ratio = (std::log(p_rest) - log_q_rest) * direction;
    value += call.reverse ? math::divergence_term(q_rest, p_rest, rest_ratio)
                          : math::divergence_term(p_rest, q_rest, rest_ratio);
  }
  value += (p_sum - q_sum) * direction;
  solution.value = call.tail != Tail::ignore && value < 0 ? 0 : value;
  if constexpr (!gradients) return solution;

  if (!call.reverse) {
    solution.outside = p_sum * q_rest - p_rest;
    const bool unbounded = solution.value == infinity;
    // The derivative of the teacher's side by ln p is p (ratio + constant).
    double constant = p_rest > 0 ? -rest_ratio : 1;
    if (renormalized) {
      constant = -sum_over(outcomes, [&](int64_t i) { return math::product(outcomes.p[i], outcomes.logit[i]); });
    }
    for (int64_t i = 0; i < vectors; ++i) {
      const Doubles p = outcomes.p[i], slope = outcomes.logit[i] + constant;
      outcomes.log_p[i] = unbounded ? Doubles{} : math::product(p, slope);
      outcomes.logit[i] = outcomes.q[i] * p_sum - p;
    }
    return solution;
  }
  const double more = call.tail == Tail::ignore ? 1 : 0;  // the derivative of q ln(q / p) by q is ratio + 1
  double mean = sum_over(outcomes, [&](int64_t i) { return math::product(outcomes.q[i], outcomes.logit[i] + more); });
  const double rest_slope = bucket ? rest_ratio : 0;
  mean += math::product(q_rest, rest_slope);
  const bool unbounded = mean == infinity;
  solution.outside = unbounded ? 0 : math::product(q_rest, rest_slope - mean);
  const double by_p = renormalized ? 1 : p_rest > 0 ? q_rest / p_rest : 0;
  for (int64_t i = 0; i < vectors; ++i) {
    const Doubles p = outcomes.p[i], q = outcomes.q[i], slope = outcomes.logit[i] + (more - mean);
    outcomes.logit[i] = unbounded ? Doubles{} : math::product(q, slope);
    outcomes.log_p[i] = p * by_p - q;
  }
  return solution;
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
