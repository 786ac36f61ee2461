// The divergence of a position, once the unlisted classes are summed up: the listed classes, and the rest as one more
// outcome. All of it is in double, because the mass of the rest is what a sum near 1 leaves.
#pragma once

#include <cmath>
#include <limits>

#include "topk_divergence/math.h"
#include "topk_divergence/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY::topk {

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

// The same for finite numbers, accurate well beyond double
template <class Body>
KDKERNELS_INLINE double exact_sum_over(const Outcomes& outcomes, const Body& body) {
  ExactSum<Doubles> sum;
  for (int64_t i = 0; i < outcomes.vectors; ++i) sum.add(body(i));
  return double(sum.total());
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

// What a position's divergence and its gradients are made of: sums over the listed classes, and the rest
struct Sides {
  double p_sum, p_rest, q_rest;  // p_sum counts p_rest
  double rest_ratio;             // ln(p_R / q_R), or ln(q_R / p_R) in reverse
  bool renormalized, bucket, ignore;
};

// Forward: the gradient by a logit is q sum(p) - p, and by ln p it is p (ratio + constant).
KDKERNELS_INLINE void differentiate(const Outcomes& outcomes, const Sides& sides, Solution& solution) {
  solution.outside = sides.p_sum * sides.q_rest - sides.p_rest;
  double constant = sides.p_rest > 0 ? -sides.rest_ratio : 1;
  if (sides.renormalized) {
    constant = -sum_over(outcomes, [&](int64_t i) { return math::product_or_zero(outcomes.p[i], outcomes.logit[i]); });
  }
  const bool unbounded = solution.value == std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < outcomes.vectors; ++i) {
    const Doubles p = outcomes.p[i], slope = outcomes.logit[i] + constant;
    outcomes.log_p[i] = unbounded ? Doubles{} : math::product_or_zero(p, slope);
    outcomes.logit[i] = outcomes.q[i] * sides.p_sum - p;
  }
}

// Reverse: the gradient by a logit is q (u - mean of u) with the derivative u of the divergence by q, up to a constant.
KDKERNELS_INLINE void differentiate_reverse(const Outcomes& outcomes, const Sides& sides, Solution& solution) {
  const double constant = sides.ignore ? 1 : 0, rest_slope = sides.bucket ? sides.rest_ratio : 0;
  const double mean = math::product_or_zero(sides.q_rest, rest_slope) + sum_over(outcomes, [&](int64_t i) {
                        return math::product_or_zero(outcomes.q[i], outcomes.logit[i] + constant);
                      });
  const bool unbounded = mean == std::numeric_limits<double>::infinity();
  solution.outside = unbounded ? 0 : math::product_or_zero(sides.q_rest, rest_slope - mean);
  const double by_p = sides.renormalized ? 1 : sides.p_rest > 0 ? sides.q_rest / sides.p_rest : 0;
  for (int64_t i = 0; i < outcomes.vectors; ++i) {
    const Doubles q = outcomes.q[i], slope = outcomes.logit[i] + (constant - mean);
    outcomes.logit[i] = unbounded ? Doubles{} : math::product_or_zero(q, slope);
    outcomes.log_p[i] = outcomes.p[i] * by_p - q;
  }
}

// Computes a position; with `gradients`, also the gradients, in place of the logits and of log p.
template <bool gradients>
KDKERNELS_INLINE Solution solve(const TopKCall& call, const Outcomes& outcomes, const Rest& rest) {
  Sides sides{
      1, 0, 0, 0, call.tail == TopKTail::renormalize, call.tail == TopKTail::bucket, call.tail == TopKTail::ignore};
  Solution solution{0, 0, 0, 0};
  if (call.want_masses || !sides.renormalized) {
    const auto p = [&](int64_t i) { return math::exp_nonpositive(outcomes.log_p[i]); };
    solution.target_mass = exact_sum_over(outcomes, p);
  }

  // The student's softmax, over all classes or over the listed ones
  const double rest_logit = rest.largest / call.temperature;
  double shift = largest_of(outcomes.logit, outcomes.vectors);
  if (!sides.renormalized && rest.sum > 0 && rest_logit > shift) shift = rest_logit;
  if (shift == -std::numeric_limits<double>::infinity()) shift = 0;
  const auto numerator = [&](int64_t i) { return outcomes.q[i] = math::exp_nonpositive(outcomes.logit[i] - shift); };
  const double listed_sum = exact_sum_over(outcomes, numerator);
  const double rest_sum = rest.sum == 0 ? 0 : rest.sum * std::exp(rest_logit - shift);
  solution.input_mass = listed_sum / (listed_sum + rest_sum);
  if (sides.renormalized && outcomes.listed == 0) {
    for (int64_t i = 0; gradients && i < outcomes.vectors; ++i) outcomes.logit[i] = outcomes.log_p[i] = Doubles{};
    return solution;
  }
  if (sides.renormalized) renormalize_teacher(outcomes);
  const double total = sides.renormalized ? listed_sum : listed_sum + rest_sum, log_total = std::log(total);

  // ln(p / q) or ln(q / p) of the listed classes, in place of their logits
  const double direction = call.reverse ? -1 : 1;
  double value = sum_over(outcomes, [&](int64_t i) {
    const Doubles p = math::exp_nonpositive(outcomes.log_p[i]), q = outcomes.q[i] / total;
    const Doubles log_q = (outcomes.logit[i] - shift) - log_total;
    const Doubles ratio = (outcomes.log_p[i] - log_q) * direction;
    outcomes.p[i] = p;
    outcomes.q[i] = q;
    outcomes.logit[i] = ratio;
    if (sides.ignore) return math::product_or_zero(call.reverse ? q : p, ratio);
    return call.reverse ? math::outcome_term(q, p, ratio) : math::outcome_term(p, q, ratio);
  });
  if (!sides.renormalized) {
    sides.q_rest = rest_sum / total;
    sides.p_sum = solution.target_mass;
  }
  if (sides.bucket) {
    // Without unlisted classes there is no rest.
    if (outcomes.listed < call.classes && sides.p_sum < 1) sides.p_rest = 1 - sides.p_sum;
    if (sides.p_rest > 0) sides.p_sum = 1;
    const double log_q_rest = rest_logit + std::log(rest.sum) - shift - log_total;
    sides.rest_ratio = (std::log(sides.p_rest) - log_q_rest) * direction;
    value += call.reverse ? math::outcome_term(sides.q_rest, sides.p_rest, sides.rest_ratio)
                          : math::outcome_term(sides.p_rest, sides.q_rest, sides.rest_ratio);
    // The terms are w ln(w / v) - w + v. Where p adds up to 1, as q does, what they have more is 0.
    value += (sides.p_sum - 1) * direction;
  }
  solution.value = !sides.ignore && value < 0 ? 0 : value;
  if constexpr (gradients) {
    if (call.reverse) {
      differentiate_reverse(outcomes, sides, solution);
    } else {
      differentiate(outcomes, sides, solution);
    }
  }
  return solution;
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY::topk
