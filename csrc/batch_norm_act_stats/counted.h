// The cases of the instruction counter.
#pragma once

#include "batch_norm_act_stats/plan.h"
#include "core/cpu/counting.h"

namespace kdkernels::counted::batch_norm_act_stats {

inline void count_layout(bool channels_last, Storage storage, const std::string& activation, bool with_residual) {
  constexpr int64_t samples = 4, channels = 48, plane = 256, count = samples * channels * plane;
  Numbers input(storage, count, 3), grad(storage, count, 4), output(storage, count, 5), result(storage, count);
  Numbers by_residual(storage, count);
  const int64_t padded = channels + cpu::BatchNormActCall::padding;
  Numbers scale(Storage::float32, padded, 6), shift(Storage::float32, padded, 7), mean(Storage::float32, padded, 8);
  Numbers constant(Storage::float32, padded, 9), slope(Storage::float32, padded, 10);

  const auto place = [&](Numbers& numbers) {
    return channels_last ? ChannelTensor{numbers.data(), 0, 0, channels}
                         : ChannelTensor{numbers.data(), channels * plane, plane, 0};
  };
  BatchNormActArguments arguments;
  static_cast<ChannelInput&>(arguments) = {storage, channels_last, samples, channels, plane, place(input)};
  arguments.activation = activation_of(activation, 0.01);
  BatchNormActArguments forward = arguments;
  forward.output = place(result);
  if (with_residual) forward.residual = place(output);
  cpu::BatchNormActCall call(forward);
  call.scale = scale.data();
  call.shift = shift.data();
  std::vector<double> partial(size_t(2 * call.parts() * channels));
  call.partial = partial.data();
  const std::string what = ": " + activation + (with_residual ? " of residual" : "") + ", [4, 48, 16, 16]" +
                           std::string(channels_last ? " channels_last, " : ", ") + name_of(storage);
  run_case(
      "batch_norm_act_stats" + what, count, [&] { run_kernel(cpu::avx2::batch_norm_act_forward, call); },
      [&] { return result.magnitude(); });
  arguments.grad_output = place(grad);
  arguments.grad_input = place(result);
  if (with_residual) {
    arguments.output = place(output);
    arguments.grad_residual = place(by_residual);
  }
  cpu::BatchNormActCall backward(arguments);
  backward.scale = scale.data();
  backward.shift = shift.data();
  backward.mean = mean.data();
  backward.constant = constant.data();
  backward.slope = slope.data();
  run_case(
      "batch_norm_act_stats_backward" + what, count, [&] { run_kernel(cpu::avx2::batch_norm_act_backward, backward); },
      [&] { return result.magnitude(); });
}

inline void run_cases() {
  for (const bool channels_last : {false, true}) {
    count_layout(channels_last, Storage::float32, "relu", false);
    count_layout(channels_last, Storage::float32, "relu", true);
    count_layout(channels_last, Storage::bfloat16, "relu", false);
  }
  count_layout(true, Storage::float32, "silu", false);
  count_layout(false, Storage::float32, "hardswish", false);
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::batch_norm_act_stats
