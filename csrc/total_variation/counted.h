// The cases of the instruction counter.
#pragma once

#include "core/cpu/counting.h"
#include "total_variation/cpu_volume_plan.h"
#include "total_variation/plan.h"

namespace kdkernels::counted::total_variation {

struct Images {
  int64_t images, channels, size;
  bool channels_last;

  int64_t count() const { return images * channels * size * size; }
  std::string name() const {
    const std::string side = std::to_string(size);
    return "[" + std::to_string(images) + ", " + std::to_string(channels) + ", " + side + ", " + side + "]" +
           (channels_last ? " channels_last" : "");
  }
  ImageTensor place(Numbers& numbers) const {
    const int64_t plane = size * size;
    return {numbers.data(), channels * plane, channels_last ? 1 : plane, channels_last ? size * channels : size};
  }
};

inline ImageArguments arguments_of(const Images& shape, Storage storage, Numbers& input) {
  ImageArguments arguments;
  arguments.storage = storage;
  arguments.images = shape.images;
  arguments.rows = shape.size;
  arguments.step = shape.channels_last ? shape.channels : 1;
  arguments.planes = shape.channels_last ? 1 : shape.channels;
  arguments.length = shape.size * arguments.step;
  arguments.input = shape.place(input);
  return arguments;
}

// Without a norm_type: the three terms of image_prior_losses together
inline void count_images(const Images& shape, Storage storage, const std::string& norm_type = "") {
  Numbers input(storage, shape.count(), 8), output(storage, shape.count());
  const bool priors = norm_type.empty(), isotropic = norm_type == "isotropic";
  ImageArguments arguments = arguments_of(shape, storage, input);
  if (!priors) arguments.set_options(norm_type, 2, 0, "sum");
  cpu::ImageCall call(arguments);
  std::vector<DifferenceSums> partial(size_t(call.items()));
  call.partial = partial.data();
  const std::string op = priors ? "image_prior_losses" : "total_variation";
  const std::string what = ": " + (priors ? "" : norm_type + ", ") + shape.name() + ", " + name_of(storage);
  run_case(
      op + what, shape.count(),
      [&] { run_kernel(isotropic ? cpu::avx2::isotropic_sums : cpu::avx2::difference_sums, call); },
      [&] {
        double sum = 0;
        for (const DifferenceSums& sums : partial) sum += sums.absolute[0] + sums.squares[0] + sums.isotropic;
        return sum;
      });
  math::DifferenceCoefficients<double> coefficients;
  for (int k = 0; k < 4; ++k) {
    coefficients.linear[k] = 0.5;
    coefficients.absolute[k] = 0.75;
  }
  coefficients.pixel = 0.25;
  const std::vector<math::DifferenceCoefficients<double>> by_image(size_t(shape.images), coefficients);
  call.coefficients = by_image.data();
  call.output = shape.place(output);
  run_case(
      op + "_backward" + what, shape.count(),
      [&] { run_kernel(isotropic ? cpu::avx2::isotropic_gradients : cpu::avx2::difference_gradients, call); },
      [&] { return output.magnitude(); });
}

struct Volumes {
  int64_t images, channels, depth, size;
  bool channels_last;

  int64_t count() const { return images * channels * depth * size * size; }
  std::string name() const {
    const std::string side = std::to_string(size);
    return "[" + std::to_string(images) + ", " + std::to_string(channels) + ", " + std::to_string(depth) + ", " + side +
           ", " + side + "]" + (channels_last ? " channels_last" : "");
  }
  cpu::VolumeTensor place(Numbers& numbers) const {
    const int64_t plane = depth * size * size, step = channels_last ? channels : 1;
    return {numbers.data(), channels * plane, channels_last ? 1 : plane, size * size * step, size * step};
  }
};

inline void count_volumes(const Volumes& shape, Storage storage, math::PairNorm norm, const std::string& what,
                          bool masked = false) {
  Numbers input(storage, shape.count(), 8), output(storage, shape.count());
  std::vector<uint8_t> mask(size_t(shape.count()), 1);
  cpu::VolumeArguments arguments;
  arguments.storage = storage;
  arguments.images = shape.images;
  arguments.slices = shape.depth;
  arguments.rows = shape.size;
  arguments.step = shape.channels_last ? shape.channels : 1;
  arguments.planes = shape.channels_last ? 1 : shape.channels;
  arguments.length = shape.size * arguments.step;
  arguments.input = shape.place(input);
  arguments.norm = norm;
  for (int axis = 0; axis < 3; ++axis) {
    arguments.scale[axis] = 0.5;
    arguments.threshold[axis] = 1;
  }
  if (masked) {
    for (size_t i = 0; i < mask.size(); i += 7) mask[i] = 0;
    arguments.mask = arguments.input;
    arguments.mask.data = mask.data();
  }
  cpu::VolumeCall call(arguments);
  std::vector<cpu::VolumeSums> partial(size_t(call.items()));
  call.partial = partial.data();
  const std::string rest = ": " + what + ", " + shape.name() + ", " + name_of(storage);
  run_case(
      "total_variation_nd" + rest, shape.count(), [&] { run_kernel(cpu::avx2::volume_sums, call); },
      [&] {
        double sum = 0;
        for (const cpu::VolumeSums& sums : partial) sum += sums.terms[0] + sums.terms[1] + sums.terms[2];
        return sum;
      });
  cpu::VolumeCoefficients coefficients;
  for (double& axis : coefficients.axis) axis = 0.5;
  const std::vector<cpu::VolumeCoefficients> by_image(size_t(shape.images), coefficients);
  arguments.output = shape.place(output);
  cpu::VolumeCall backward(arguments);
  backward.coefficients = by_image.data();
  run_case(
      "total_variation_nd_backward" + rest, shape.count(), [&] { run_kernel(cpu::avx2::volume_gradients, backward); },
      [&] { return output.magnitude(); });
}

inline void run_cases() {
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    for (const bool channels_last : {false, true}) count_images({4, 3, 32, channels_last}, storage);
  }
  count_images({1, 3, 112, false}, Storage::float32);
  for (const char* norm_type : {"l1", "l2_squared", "isotropic"}) {
    count_images({4, 3, 32, false}, Storage::float32, norm_type);
  }
  using math::PairNorm;
  const Volumes volume{1, 2, 12, 48, false}, last{1, 2, 12, 48, true}, grids{2, 12, 8, 16, false};
  count_volumes(volume, Storage::float32, PairNorm::absolute, "l1");
  count_volumes(volume, Storage::bfloat16, PairNorm::absolute, "l1");
  count_volumes(volume, Storage::float32, PairNorm::absolute, "l1 with a mask", true);
  count_volumes(volume, Storage::float32, PairNorm::huber, "huber");
  count_volumes(volume, Storage::float32, PairNorm::isotropic, "isotropic");
  count_volumes(last, Storage::float32, PairNorm::square, "l2_squared");
  count_volumes(grids, Storage::float32, PairNorm::square, "l2_squared");
  count_volumes({1, 1, 6, 160, false}, Storage::float32, PairNorm::square, "l2_squared");
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::total_variation
