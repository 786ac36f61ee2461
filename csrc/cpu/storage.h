// How numbers lie in memory, known at run time. No torch: kernels include this.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kdkernels::cpu {

constexpr int max_dims = 64;  // torch's own limit

enum class Storage { float64, float32, float16, bfloat16 };

KDKERNELS_INLINE int64_t size_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

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
