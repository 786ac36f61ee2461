// What the CUDA kernel of gradient reversal is given, and how its launch divides the work. No torch.
#pragma once

#include "core/cuda/vec.cuh"
#include "gradient_reversal/arguments.h"

namespace kdkernels::cuda {

struct ScaleCall : ScaleArguments {
  ScalarArgument coefficient;
};

unsigned scale_blocks(const ScaleCall& call);

// destination = -coefficient * source
cudaError_t launch_reversed_scale(const ScaleCall& call, cudaStream_t stream);

}  // namespace kdkernels::cuda
