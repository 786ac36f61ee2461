// How launches divide the work, for sizes that no test could allocate.
#include "batch_norm_stats/cuda_kernels.h"
#include "cuda_host/plan.h"

using namespace kdkernels::cuda;

extern "C" Plan batch_norm_plan(int64_t samples, int64_t channels, int64_t plane, int rows, int gradient) {
  BatchNormCall call;
  call.samples = samples;
  call.channels = channels;
  call.plane = plane;
  call.rows = rows != 0;
  const BatchNormPlan plan = plan_batch_norm(call, gradient != 0);
  const int64_t items = rows != 0 ? plan.splits * plan.items_of_split : samples;
  return {plan.grid, plan.block, 0, items};
}
