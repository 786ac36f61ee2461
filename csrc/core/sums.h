// Sums that keep their precision over long rows.
#pragma once

#include "core/value.h"

namespace kdkernels::math {

// A sum in three levels: terms are added to a short sum, which is added to a longer one every few terms, which is added
// to the total every few blocks. The rounding error grows with the square root of the number of terms in one level
// instead of the number of all terms.
template <class V>
struct BlockedSum {
  static constexpr int block = 16, blocks = 16;
  V total{}, closed{}, partial{};
  int count = 0;

  KDKERNELS_INLINE void add(V term) { partial = partial + term; }
  KDKERNELS_INLINE void close_block() {
    closed = closed + partial;
    partial = V{};
    if (++count == blocks) {
      total = total + closed;
      closed = V{};
      count = 0;
    }
  }
  // The sum of all closed blocks
  KDKERNELS_INLINE V sum() const { return total + closed; }
};

}  // namespace kdkernels::math
