// How launches divide the work, for sizes that no test could allocate.
#include "cuda_host/plan.h"
#include "softmax_divergence/cuda_kernels.h"

using namespace kdkernels::cuda;

extern "C" Plan softmax_plan(int64_t positions, int64_t classes, int64_t class_stride, int64_t inner_stride,
                             int backward) {
  SoftmaxCall call;
  call.positions = call.inner = positions;
  call.classes = classes;
  for (auto& operand : call.operand) {
    operand.class_stride = class_stride;
    operand.inner_stride = inner_stride;
  }
  const SoftmaxPlan plan = plan_softmax(call, backward != 0, 232448);
  const int64_t turns = ceil_div(positions, plan.grid * plan.positions);
  return {plan.grid, plan.block, int64_t(plan.shared_bytes), turns * plan.grid * plan.positions};
}
