// What the kernel of gradient reversal is asked to do, in plain numbers and pointers.
#pragma once

#include "core/cpu/capability.h"
#include "core/cpu/storage.h"

namespace kdkernels::cpu {

struct ScaleCall {
  Storage storage;
  const void* source;
  void* destination;
  double factor;
};

// destination = factor * source for the numbers begin to end
KDKERNELS_KERNEL(void, scale_numbers, (const ScaleCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
