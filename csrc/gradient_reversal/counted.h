// The cases of the instruction counter.
#pragma once

#include "core/cpu/counting.h"
#include "gradient_reversal/plan.h"

namespace kdkernels::counted::gradient_reversal {

// Computed by torch
[[maybe_unused]] constexpr const char* without_kernel[] = {"gradient_reversal_copy"};

inline void run_cases() {
  constexpr int64_t count = 16000;
  for (const Storage storage : {Storage::float32, Storage::float16, Storage::bfloat16}) {
    Numbers source(storage, count, 9), destination(storage, count);
    const cpu::ScaleCall call{{storage, source.data(), destination.data(), count}, -0.5};
    run_case(
        std::string("gradient_reversal_backward: [16, 1000], ") + name_of(storage), count,
        [&] { run_kernel(cpu::avx2::scale_numbers, call); }, [&] { return destination.magnitude(); });
  }
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::gradient_reversal
