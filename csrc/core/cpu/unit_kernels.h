// The building blocks of kernels in the lanes of vectors, for unit tests.
#pragma once

#include "core/cpu/unit.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

template <class V>
KDKERNELS_INLINE void evaluate(const char* name, Scalar<V>* values, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<V>) {
    const int64_t here = count - i < lanes<V> ? count - i : lanes<V>;
    store_part(values + i, apply_function(name, load_part<V>(values + i, here, Scalar<V>(-0.5))), here);
  }
}

void evaluate_vectors(const char* name, void* values, int64_t count, bool is_double) {
  if (is_double) {
    evaluate<Vector<double, KDKERNELS_VECTOR_BYTES>>(name, static_cast<double*>(values), count);
  } else {
    evaluate<Vector<float, KDKERNELS_VECTOR_BYTES>>(name, static_cast<float*>(values), count);
  }
}

void round_trip(float* values, int64_t count, Storage storage) {
  using V = Vector<float, KDKERNELS_VECTOR_BYTES>;
  with_storage(storage, [&](auto type) {
    decltype(type) stored[lanes<V>];
    for (int64_t i = 0; i < count; i += lanes<V>) {
      const int64_t here = count - i < lanes<V> ? count - i : lanes<V>;
      store(stored, load_part<V>(values + i, here, 0.f));
      store_part(values + i, load<V>(stored), here);
    }
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
