// Multiplies numbers by a factor.
#pragma once

#include "gradient_reversal/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

void scale_numbers(const ScaleCall& call, int64_t begin, int64_t end) {
  with_storage(call.storage, [&](auto type) {
    using T = decltype(type);
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    using V = Vector<S, KDKERNELS_VECTOR_BYTES>;
    const T* const source = static_cast<const T*>(call.source);
    T* const destination = static_cast<T*>(call.destination);
    const S factor = S(call.factor);
    int64_t i = begin;
    for (; i + lanes<V> <= end; i += lanes<V>) store(destination + i, load<V>(source + i) * factor);
    if (i < end) store_part(destination + i, load_part<V>(source + i, end - i, S(0)) * factor, end - i);
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
