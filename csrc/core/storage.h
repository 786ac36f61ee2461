// The types of numbers: as they are stored, which is known at run time, and as they are computed with. No torch, no
// CUDA: kernels include this.
#pragma once

#include "core/value.h"

namespace kdkernels {

constexpr int max_dims = 64;  // torch's own limit

enum class Storage { float64, float32, float16, bfloat16 };

KDKERNELS_INLINE constexpr int64_t size_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// The type that numbers stored as T are computed in: 16-bit numbers are never computed with.
template <class T>
using Compute = std::conditional_t<sizeof(T) == 8, double, float>;

// A type as an argument
template <class T>
struct Type {
  using type = T;
};

}  // namespace kdkernels
