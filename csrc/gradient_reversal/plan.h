// How the CPU cuts the work of gradient reversal, by size alone, and the kernel that does it. No torch.
#pragma once

#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"
#include "gradient_reversal/arguments.h"

namespace kdkernels::cpu {

struct ScaleCall : ScaleArguments {
  double factor;

  Chunks chunks() const { return {count, 1}; }
};

// destination = factor * source for the numbers begin to end
KDKERNELS_KERNEL(void, scale_numbers, (const ScaleCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
