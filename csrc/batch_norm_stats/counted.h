// The cases of the instruction counter.
#pragma once

#include "batch_norm_stats/plan.h"
#include "core/cpu/counting.h"

namespace kdkernels::counted::batch_norm_stats {

// Computed by the binding, from a few numbers of a layer
[[maybe_unused]] constexpr const char* without_kernel[] = {"batch_norm_stat_distances",
                                                           "batch_norm_stat_distances_backward"};

inline void count_layout(bool channels_last, Storage storage) {
  constexpr int64_t samples = 4, channels = 48, plane = 256, count = samples * channels * plane;
  Numbers input(storage, count, 3), grad_output(storage, count, 4), output(storage, count);
  Numbers mean(Storage::float32, channels, 5), constant(Storage::float32, channels, 6);
  Numbers slope(Storage::float32, channels, 7);

  const auto place = [&](Numbers& numbers) {
    return channels_last ? ChannelTensor{numbers.data(), 0, 0, channels}
                         : ChannelTensor{numbers.data(), channels * plane, plane, 0};
  };
  BatchNormArguments arguments;
  static_cast<ChannelInput&>(arguments) = {storage, channels_last, samples, channels, plane, place(input)};
  cpu::BatchNormCall call(arguments);
  std::vector<cpu::Moments> partial(size_t(call.groups() * channels));
  call.partial = partial.data();
  const std::string what =
      ": [4, 48, 16, 16]" + std::string(channels_last ? " channels_last, " : ", ") + name_of(storage);
  run_case(
      "batch_norm_stats" + what, count, [&] { run_kernel(cpu::avx2::batch_norm_moments, call); },
      [&] {
        double sum = 0;
        for (const cpu::Moments& moments : partial) sum += double(moments.count * moments.squares);
        return sum;
      });
  call.grad_output = place(grad_output);
  call.output = place(output);
  call.mean = mean.data();
  call.constant = constant.data();
  call.slope = slope.data();
  run_case(
      "batch_norm_tap_backward" + what, count, [&] { run_kernel(cpu::avx2::batch_norm_gradient, call); },
      [&] { return output.magnitude(); });
}

inline void run_cases() {
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    for (const bool channels_last : {false, true}) count_layout(channels_last, storage);
  }
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::batch_norm_stats
