// The backward of gradient reversal: one multiplication. The forward is a view, or a copy where a view is not allowed.
#include "core/cuda/binding.h"
#include "gradient_reversal/binding.h"
#include "gradient_reversal/cuda_kernels.h"

namespace kdkernels::cuda {
namespace {

Tensor gradient_reversal_backward(Tensor grad_output, Tensor lambd) {
  const OnDevice device(grad_output);
  Tensor result = torch::stable::empty_like(grad_output);
  if (result.numel() == 0) return result;
  const Tensor source = laid_out_as(grad_output, result);
  const ScaleCall call{arguments_of(source, result), scalar_argument(lambd)};
  device.check(launch_reversed_scale(call, device.stream()));
  return result;
}

Tensor gradient_reversal_copy(Tensor input, Tensor /*lambd*/) {
  const OnDevice device(input);
  Tensor result = torch::stable::empty_like(input);
  torch::stable::copy_(result, input);
  return result;
}

}  // namespace
}  // namespace kdkernels::cuda

KDKERNELS_REGISTER(m) {
  m.impl("gradient_reversal_backward.native", TORCH_BOX(&kdkernels::cuda::gradient_reversal_backward));
  m.impl("gradient_reversal_copy.native", TORCH_BOX(&kdkernels::cuda::gradient_reversal_copy));
}
