// How launches divide the work, for sizes that no test could allocate.
#include "cuda_host/plan.h"
#include "gradient_reversal/cuda_kernels.h"

using namespace kdkernels::cuda;

extern "C" Plan scale_plan(int64_t count) {
  ScaleCall call;
  call.count = count;
  return {scale_blocks(call), 256, 0, count};
}
