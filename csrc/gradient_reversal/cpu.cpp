// The backward of gradient reversal: one multiplication. The forward is a view, or a copy where a view is not allowed.
#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "gradient_reversal/binding.h"
#include "gradient_reversal/plan.h"

namespace kdkernels::cpu {
namespace {

Tensor gradient_reversal_backward(Tensor grad_output, Tensor lambd) {
  Tensor result = new_output(grad_output);
  const Tensor source = laid_out_as(grad_output, result);
  run_kernel(scale_numbers, ScaleCall{arguments_of(source, result), -read_scalar(lambd)});
  return result;
}

Tensor gradient_reversal_copy(Tensor input, Tensor /*lambd*/) {
  Tensor result = new_output(input);
  torch::stable::copy_(result, input);
  return result;
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("gradient_reversal_backward.native", TORCH_BOX(&kdkernels::cpu::gradient_reversal_backward));
  m.impl("gradient_reversal_copy.native", TORCH_BOX(&kdkernels::cpu::gradient_reversal_copy));
}
