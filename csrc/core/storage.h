// How numbers lie in memory, known at run time. No torch, no CUDA: kernels include this.
#pragma once

#include "core/value.h"

namespace kdkernels {

constexpr int max_dims = 64;  // torch's own limit

enum class Storage { float64, float32, float16, bfloat16 };

KDKERNELS_INLINE constexpr int64_t size_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

}  // namespace kdkernels
