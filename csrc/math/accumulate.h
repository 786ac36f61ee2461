// Sums that keep their precision over long rows.
#pragma once

#include "value.h"

namespace kdkernels::math {

// A sum in two levels: terms are added to a short sum, which joins the total every few terms. The rounding
// error grows with the square root of the number of terms in a level instead of that of all terms.
template <class V>
struct BlockedSum {
  static constexpr int block = 16;
  V total{}, partial{};

  KDKERNELS_INLINE void add(V term) { partial = partial + term; }
  KDKERNELS_INLINE void close_block() {
    total = total + partial;
    partial = V{};
  }
};

}  // namespace kdkernels::math
