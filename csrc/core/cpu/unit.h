// The building blocks of kernels, by name, for unit tests.
#pragma once

#include <cstring>

#include "core/cpu/capability.h"
#include "core/cpu/storage.h"
#include "core/fast_exp.h"

namespace kdkernels::cpu {

// NaN for an unknown name
template <class V>
KDKERNELS_INLINE V apply_function(const char* name, V x) {
  if (std::strcmp(name, "exp_nonpositive") == 0) return math::exp_nonpositive(x);
  if (std::strcmp(name, "expm1") == 0) return math::exp_differences(x).expm1;
  if (std::strcmp(name, "expm1_rest") == 0) return math::exp_differences(x).rest;
  if (std::strcmp(name, "product_rest") == 0) return math::exp_differences(x).product_rest;
  if (std::strcmp(name, "log_positive") == 0) return math::log_positive(x);
  if (std::strcmp(name, "log1p") == 0) return math::log1p_parts(x).value;
  if (std::strcmp(name, "log1p_rest") == 0) return math::log1p_parts(x).rest;
  return V{} / V{};
}

KDKERNELS_KERNEL(void, evaluate_vectors, (const char* name, void* values, int64_t count, bool is_double),
                 (name, values, count, is_double))
KDKERNELS_KERNEL(void, round_trip, (float* values, int64_t count, Storage storage), (values, count, storage))

}  // namespace kdkernels::cpu
