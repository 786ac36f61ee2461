// The cases of the instruction counter.
#pragma once

#include "core/cpu/counting.h"
#include "pointwise_divergence/plan.h"

namespace kdkernels::counted::pointwise_divergence {

// Forward and backward of a formula on 16 x 1000 elements; the gradient is that of the input alone.
inline void count_formula(const std::string& name, Storage storage) {
  constexpr int64_t count = 16000;
  Numbers input(storage, count, 3), target(storage, count, 4), gradient(storage, count);
  double incoming = 0.5;
  PointwiseArguments arguments;
  arguments.choose_formula(name);
  PointwiseLayout layout;
  layout.dims = 1;
  layout.size[0] = count;
  layout.operand[left] = {input.data(), storage, {1}};
  layout.operand[right] = {target.data(), storage, {1}};
  double total = 0;
  const std::string what = ": " + name + ", [16, 1000], " + name_of(storage);
  const cpu::PointwiseCall forward(layout, arguments);
  run_case(
      "pointwise_divergence" + what, count,
      [&] {
        total = 0;
        for_each_chunk(forward.chunks(),
                       [&](int64_t begin, int64_t end) { total += cpu::avx2::pointwise_losses(forward, begin, end); });
      },
      [&] { return total; });
  layout.operand[incoming_gradient] = {&incoming, Storage::float64, {0}};
  layout.operand[left_result] = {gradient.data(), storage, {1}};
  const cpu::PointwiseCall backward(layout, arguments);
  run_case(
      "pointwise_divergence_backward" + what, count,
      [&] {
        for_each_chunk(backward.chunks(),
                       [&](int64_t begin, int64_t end) { cpu::avx2::pointwise_gradients(backward, begin, end); });
      },
      [&] { return gradient.magnitude(); });
}

inline void run_cases() {
  for (const char* name : {"kl_log", "js_log", "binary_kl"}) {
    for (const Storage storage : {Storage::float32, Storage::bfloat16}) count_formula(name, storage);
  }
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::pointwise_divergence
