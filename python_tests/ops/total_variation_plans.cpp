// How launches divide the work, for sizes that no test could allocate.
#include "cuda_host/plan.h"
#include "total_variation/cuda_kernels.h"

using namespace kdkernels::cuda;

extern "C" Plan image_plan(int64_t images, int64_t planes, int64_t rows, int64_t length) {
  ImageCall call;
  call.images = images;
  call.planes = planes;
  call.rows = rows;
  call.length = length;
  const ImagePlan plan = plan_images(call);
  const int64_t strips = plan.block / plan.across;
  return {plan.grid, plan.block, 0, plan.row_blocks * strips * plan.strip};
}
