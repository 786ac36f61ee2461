// A divergence of finitely many outcomes, term by term.
#pragma once

#include "core/fast_exp.h"

namespace kdkernels::math {

// One outcome's term w ln(w / v) - w + v >= 0 of the divergence from v to w, with log_ratio = ln(w / v). The sum of v -
// w over all outcomes is known, so that it can be added back. Written as a share of the larger of w and v, the term is
// of second order in log_ratio and keeps its precision where w and v nearly agree. It is 0 where both are.
template <class V>
KDKERNELS_INLINE V outcome_term(V w, V v, V log_ratio) {
  const ExpDifferences<V> e = exp_differences(-absolute(log_ratio));
  const auto w_larger = log_ratio > Scalar<V>(0);
  const V larger = select(w_larger, w, v);
  return select(larger > Scalar<V>(0), larger * select(w_larger, e.rest, e.product_rest), larger);
}

// factor * value, which is 0 where the factor is, even if the value is infinite
template <class V>
KDKERNELS_INLINE V product_or_zero(V factor, V value) {
  return select(factor != Scalar<V>(0), factor * value, V{});
}

}  // namespace kdkernels::math
