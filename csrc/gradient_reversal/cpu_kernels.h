// Multiplies numbers by a factor.
#pragma once

#include "gradient_reversal/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

void scale_numbers(const ScaleCall& call, int64_t begin, int64_t end) {
  with_vectors<KDKERNELS_VECTOR_BYTES>(call.storage, [&](auto vector, auto type) {
    using V = decltype(vector);
    using S = Scalar<V>;
    using T = decltype(type);
    const T* const source = static_cast<const T*>(call.source);
    T* const destination = static_cast<T*>(call.destination);
    const S factor = S(call.factor);
    int64_t i = begin;
    for (; i + lanes<V> <= end; i += lanes<V>) store(destination + i, load<V>(source + i) * factor);
    if (i < end) store_part(destination + i, load_part<V>(source + i, end - i, S(0)) * factor, end - i);
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
