// The backward of gradient reversal: one multiplication. The forward is a view, and the formula needs no file.
#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "gradient_reversal/plan.h"

namespace kdkernels::cpu {
namespace {

Tensor gradient_reversal_backward(Tensor grad_output, Tensor lambd) {
  Tensor result = new_output(grad_output);
  const Tensor source = laid_out_as(grad_output, result);
  const ScaleCall call{storage_of(source), source.const_data_ptr(), result.mutable_data_ptr(), -read_scalar(lambd)};
  for_each_chunk(Chunks(source.numel(), 1),
                 [&](int64_t, int64_t begin, int64_t end) { scale_numbers(call, begin, end); });
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
