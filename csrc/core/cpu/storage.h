// How numbers lie in memory, known at run time. No torch: kernels include this.
#pragma once

#include "core/cpu/simd.h"
#include "core/storage.h"

namespace kdkernels::cpu {

// body(T()) with the type that the numbers are stored as
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

}  // namespace kdkernels::cpu
