// What a call of gradient reversal asks for, in plain numbers: one description for both devices. No torch, no CUDA:
// kernels include this. The formula, one multiplication, needs no math.h.
#pragma once

#include "core/storage.h"

namespace kdkernels {

// `count` numbers in a row, to be multiplied
struct ScaleArguments {
  Storage storage = Storage::float32;
  const void* source = nullptr;
  void* destination = nullptr;
  int64_t count = 0;
};

}  // namespace kdkernels
