// What the kernel of gradient reversal is asked to do, in plain numbers and pointers.
#pragma once

#include "core/cuda/vec.cuh"

namespace kdkernels::cuda {

struct ScaleCall {
  Storage storage = Storage::float32;
  const void* source = nullptr;
  void* destination = nullptr;
  int64_t count = 0;
  ScalarArgument coefficient;
};

unsigned scale_blocks(const ScaleCall& call);

// destination = -coefficient * source
cudaError_t launch_reversed_scale(const ScaleCall& call, cudaStream_t stream);

}  // namespace kdkernels::cuda
