// The backward of gradient reversal: one multiplication. The forward is a view, and the formula needs no file.
#include "../common/dispatch.h"
#include "gradient_reversal_call.h"
#include "memory.h"
#include "parallel.h"

namespace kdkernels::cpu {
namespace {

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

Tensor gradient_reversal_backward(Tensor grad_output, Tensor lambd) {
  Tensor result = new_output(grad_output);
  // Where memory has no gaps it is one row of numbers, whatever the order of the dimensions.
  Tensor source = grad_output;
  if (!same_strides(grad_output, result)) {
    source = torch::stable::empty_like(result);
    torch::stable::copy_(source, grad_output);
  }
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
