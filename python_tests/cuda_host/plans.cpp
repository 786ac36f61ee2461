// How launches divide the work, for sizes that no test could allocate
#include "batch_norm_stats/cuda_kernels.h"
#include "gradient_reversal/cuda_kernels.h"
#include "softmax_divergence/cuda_kernels.h"
#include "total_variation/cuda_kernels.h"

using namespace kdkernels::cuda;

struct Plan {
  int64_t grid, block, shared_bytes;
  int64_t covered;  // what all blocks take in one turn, times their turns
};

extern "C" {

Plan softmax_plan(int64_t positions, int64_t classes, int64_t class_stride, int64_t inner_stride, int backward) {
  SoftmaxCall call;
  call.positions = call.inner = positions;
  call.classes = classes;
  for (SoftmaxOperand& operand : call.operand) {
    operand.class_stride = class_stride;
    operand.inner_stride = inner_stride;
  }
  const SoftmaxPlan plan = plan_softmax(call, backward != 0, 232448);
  const int64_t turns = ceil_div(positions, plan.grid * plan.positions);
  return {plan.grid, plan.block, int64_t(plan.shared_bytes), turns * plan.grid * plan.positions};
}

Plan batch_norm_plan(int64_t samples, int64_t channels, int64_t plane, int rows, int gradient) {
  BatchNormCall call;
  call.samples = samples;
  call.channels = channels;
  call.plane = plane;
  call.rows = rows != 0;
  const BatchNormPlan plan = plan_batch_norm(call, gradient != 0);
  const int64_t items = rows != 0 ? plan.splits * plan.items_of_split : samples;
  return {plan.grid, plan.block, 0, items};
}

Plan image_plan(int64_t images, int64_t planes, int64_t rows, int64_t length) {
  ImageCall call;
  call.images = images;
  call.planes = planes;
  call.rows = rows;
  call.length = length;
  const ImagePlan plan = plan_images(call);
  const int64_t strips = plan.block / plan.across;
  return {plan.grid, plan.block, 0, plan.row_blocks * strips * plan.strip};
}

Plan scale_plan(int64_t count) {
  ScaleCall call;
  call.count = count;
  return {scale_blocks(call), 256, 0, count};
}
}
