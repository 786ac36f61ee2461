// The cases of the instruction counter.
#pragma once

#include "core/cpu/counting.h"
#include "topk_divergence/plan.h"

namespace kdkernels::counted::topk_divergence {

inline void count_tail(Storage storage, TopKTail tail, bool reverse, const char* name) {
  constexpr int64_t positions = 4, classes = 8000, listed = 32;
  Numbers input(storage, positions * classes, 1), gradient(storage, positions * classes);
  std::vector<float> values(size_t(positions * listed)), rest(size_t(2 * positions));
  std::vector<int64_t> indices(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = -4 - float(i % listed) * 0.125f;
    indices[i] = int64_t(i * 211) % classes;
  }
  TopKArguments arguments;
  arguments.positions = positions;
  arguments.classes = classes;
  arguments.listed = listed;
  arguments.outer_dims = 1;
  arguments.outer_size[0] = positions;
  arguments.input = {input.data(), storage, 1, {classes}};
  arguments.values = values.data();
  arguments.indices = indices.data();
  arguments.temperature = 2;
  arguments.tail = tail;
  arguments.reverse = reverse;
  cpu::TopKCall call(arguments);
  call.rest = rest.data();
  double loss = 0;
  const std::string what = std::string(": ") + name + ", 32 of [4, 8000], " + name_of(storage);
  run_case(
      "topk_divergence" + what, positions * classes,
      [&] {
        double total = 0;
        for_each_chunk(call.chunks(), [&](int64_t begin, int64_t end) {
          int64_t refused = -1;
          total += cpu::avx2::topk_forward(call, begin, end, &refused);
        });
        loss = total;
      },
      [&] { return loss; });
  const float grad_output = 0.5f;
  call.grad_output = &grad_output;
  call.grad_input = {gradient.data(), storage, 1, {classes}};
  run_case(
      "topk_divergence_backward" + what, positions * classes, [&] { run_kernel(cpu::avx2::topk_backward, call); },
      [&] { return gradient.magnitude(); });
}

inline void run_cases() {
  count_tail(Storage::float32, TopKTail::bucket, false, "bucket");
  count_tail(Storage::bfloat16, TopKTail::bucket, false, "bucket");
  count_tail(Storage::float32, TopKTail::bucket, true, "bucket, reverse");
  count_tail(Storage::float32, TopKTail::renormalize, false, "renormalize");
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::topk_divergence
