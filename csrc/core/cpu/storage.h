// From a storage known at run time to types known at compile time. No torch: kernels include this.
#pragma once

#include "core/cpu/simd.h"
#include "core/storage.h"

namespace kdkernels::cpu {

// Calls body(T()) with the type that the numbers are stored as.
template <class Body>
KDKERNELS_INLINE void with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::float64:
      return body(double());
    case Storage::float16:
      return body(Half());
    case Storage::bfloat16:
      return body(BFloat16());
    default:
      return body(float());
  }
}

// Calls body(V(), T()) with the vector of `bytes` bytes that the numbers are computed in, and the type that they are
// stored as.
template <int bytes, class Body>
KDKERNELS_INLINE void with_vectors(Storage storage, const Body& body) {
  with_storage(storage, [&](auto type) { body(Vector<Compute<decltype(type)>, bytes>(), type); });
}

}  // namespace kdkernels::cpu
