// Total variation and the image priors of DeepInversion.
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "total_variation/binding.h"
#include "total_variation/cpu_volume_binding.h"
#include "total_variation/plan.h"

namespace kdkernels::cpu {
namespace {

using Coefficients = math::DifferenceCoefficients<double>;

// The sums over each image
std::vector<DifferenceSums> sums_by_image(const ImageArguments& arguments) {
  ImageCall call(arguments);
  std::vector<DifferenceSums> partial(size_t(call.items())), result(size_t(call.images));
  call.partial = partial.data();
  run_kernel(call.losses == Losses::isotropic ? isotropic_sums : difference_sums, call);
  for (int64_t item = 0; item < call.items(); ++item) {
    result[size_t(item / (call.planes * call.blocks))].add(partial[size_t(item)]);
  }
  return result;
}

Tensor tensor_of(const Tensor& image, const std::vector<int64_t>& shape, const std::vector<double>& values) {
  Tensor result = new_result(image, shape);
  dispatch_compute_type(is_double(image), [&](auto type) {
    using S = typename decltype(type)::type;
    for (size_t i = 0; i < values.size(); ++i) result.mutable_data_ptr<S>()[i] = S(values[i]);
  });
  return result;
}
std::vector<double> numbers_of(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<double> values(size_t(dense.numel()));
  dispatch_compute_type(is_double(dense), [&](auto type) {
    using S = typename decltype(type)::type;
    for (size_t i = 0; i < values.size(); ++i) values[i] = double(dense.const_data_ptr<S>()[i]);
  });
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> image_prior_losses(Tensor image) {
  const Tensor input = readable(image);
  ImageArguments arguments = arguments_of(input);
  arguments.average_pairs();
  const auto images = sums_by_image(arguments);
  DifferenceSums batch;
  for (const DifferenceSums& sums : images) batch.add(sums);
  std::vector<double> norms;  // of the differences over the batch, then of each image
  double tv_l1 = 0, tv_l2 = 0, l2 = 0;
  for (size_t k = 0; k < 4; ++k) {
    tv_l1 += batch.absolute[k] * arguments.weight[k];
    norms.push_back(std::sqrt(batch.squares[k]));
    tv_l2 += norms.back();
  }
  for (const DifferenceSums& sums : images) {
    norms.push_back(std::sqrt(sums.pixels));
    l2 += norms.back() / double(images.size());
  }
  return {tensor_of(image, {}, {tv_l1}), tensor_of(image, {}, {tv_l2}), tensor_of(image, {}, {l2}),
          tensor_of(image, {int64_t(norms.size())}, norms)};
}

Tensor image_prior_losses_backward(std::optional<Tensor> grad_l1, std::optional<Tensor> grad_l2,
                                   std::optional<Tensor> grad_norm, Tensor image, Tensor norms) {
  const std::vector<double> norm = numbers_of(norms);
  const auto number = [](const std::optional<Tensor>& grad) { return grad ? numbers_of(*grad)[0] : 0.0; };
  const double by_l1 = number(grad_l1), by_l2 = number(grad_l2), by_norm = number(grad_norm);
  InputAndOutput images = with_gradient(image, new_output(image));
  ImageArguments arguments = arguments_of(images);
  arguments.average_pairs();
  std::vector<Coefficients> coefficients(size_t(arguments.images));
  for (size_t b = 0; b < coefficients.size(); ++b) {
    coefficients[b].set_priors(
        by_l1, by_l2, by_norm, arguments.weight, [&](int k) { return norm[size_t(k)]; }, norm[4 + b],
        double(coefficients.size()));
  }
  ImageCall call(arguments);
  call.absolute = bool(grad_l1);
  call.squares = bool(grad_l2);
  call.pixels = bool(grad_norm);
  call.coefficients = coefficients.data();
  run_kernel(difference_gradients, call);
  return images.finish();
}

std::tuple<Tensor, Tensor> total_variation(Tensor image, std::string norm_type, int64_t directions, double eps,
                                           std::string reduction) {
  const Tensor input = readable(image);
  ImageArguments arguments = arguments_of(input);
  arguments.set_options(norm_type, directions, eps, reduction);
  std::vector<double> values;
  double total = 0;
  for (const DifferenceSums& sums : sums_by_image(arguments)) {
    values.push_back(sums.variation(arguments.losses, arguments.directions, arguments.weight));
    total += values.back();
  }
  if (arguments.average_images) total *= math::inverse(double(values.size()));
  const auto by_image = [&] { return tensor_of(image, {int64_t(values.size())}, values); };
  Tensor loss = arguments.loss_by_image ? by_image() : tensor_of(image, {}, {total});
  return {loss, arguments.losses == Losses::l2 ? by_image() : nothing(loss)};
}

Tensor total_variation_backward(Tensor grad_output, Tensor image, Tensor norms, std::string norm_type,
                                int64_t directions, double eps, std::string reduction) {
  const std::vector<double> norm = numbers_of(norms), grad = numbers_of(grad_output);
  InputAndOutput images = with_gradient(image, new_output(image));
  ImageArguments arguments = arguments_of(images);
  arguments.set_options(norm_type, directions, eps, reduction);
  std::vector<Coefficients> coefficients(size_t(arguments.images));
  const double share = arguments.average_images ? math::inverse(double(coefficients.size())) : 1;
  for (size_t b = 0; b < coefficients.size(); ++b) {
    double scale = grad[arguments.loss_by_image ? b : 0] * share;
    if (arguments.losses == Losses::l2) scale *= math::inverse(norm[b]);
    coefficients[b].set_variation(arguments.losses, scale, arguments.weight);
  }
  ImageCall call(arguments);
  call.coefficients = coefficients.data();
  run_kernel(call.losses == Losses::isotropic ? isotropic_gradients : difference_gradients, call);
  return images.finish();
}

void set_axes(VolumeArguments& arguments, const Tensor& scale, const Tensor& threshold, double eps) {
  const std::vector<double> scales = numbers_of(scale), thresholds = numbers_of(threshold);
  const size_t missing = 3 - scales.size();
  for (size_t axis = missing; axis < 3; ++axis) {
    arguments.scale[axis] = scales[axis - missing];
    arguments.threshold[axis] = thresholds[axis - missing];
  }
  arguments.eps = eps;
  for (const double factor : scales) {
    if (factor >= 0 && std::isfinite(factor)) continue;
    throw std::invalid_argument("axis_weight, spacing and delta give an axis the factor " + std::to_string(factor) +
                                "; expected finite numbers, 0 or more");
  }
}

std::tuple<Tensor, Tensor> total_variation_nd(Tensor input, std::optional<Tensor> mask, Tensor scale, Tensor threshold,
                                              double eps, std::string norm_type, std::string average,
                                              std::string reduction) {
  VolumeTensors tensors(input, mask);
  const VolumeOptions options{norm_type, average, reduction};
  VolumeArguments& arguments = tensors.arguments;
  arguments.norm = options.norm();
  set_axes(arguments, scale, threshold, eps);
  VolumeCall call(arguments);
  std::vector<VolumeSums> partial(size_t(call.items())), images(size_t(call.images));
  call.partial = partial.data();
  run_kernel(volume_sums, call);
  const int64_t items = call.planes * call.tiles * call.runs;
  for (int64_t item = 0; item < call.items(); ++item) images[size_t(item / items)].add(partial[size_t(item)]);
  std::vector<double> values, factors;
  std::vector<VolumeCoefficients> coefficients;
  options.reduce(arguments, images, bool(mask), values, coefficients);
  double total = 0;
  for (size_t b = 0; b < values.size(); ++b) {
    total += values[b];
    for (const double factor : coefficients[b].axis) factors.push_back(factor);
  }
  if (reduction == "mean") total *= math::inverse(double(values.size()));
  return {reduction == "none" ? tensor_of(input, {int64_t(values.size())}, values) : tensor_of(input, {}, {total}),
          tensor_of(input, {int64_t(values.size()), 3}, factors)};
}

Tensor total_variation_nd_backward(Tensor grad_output, Tensor input, std::optional<Tensor> mask, Tensor scale,
                                   Tensor threshold, Tensor coefficients, double eps, std::string norm_type,
                                   std::string average, std::string reduction) {
  VolumeTensors tensors(input, mask);
  tensors.set_output(new_output(input));
  VolumeArguments& arguments = tensors.arguments;
  arguments.norm = VolumeOptions{norm_type, average, reduction}.norm();
  set_axes(arguments, scale, threshold, eps);
  const std::vector<double> grad = numbers_of(grad_output), factors = numbers_of(coefficients);
  std::vector<VolumeCoefficients> by_image(size_t(arguments.images));
  for (size_t i = 0; i < factors.size(); ++i) {
    by_image[i / 3].axis[i % 3] = factors[i] * grad[reduction == "none" ? i / 3 : 0];
  }
  VolumeCall call(arguments);
  call.coefficients = by_image.data();
  run_kernel(volume_gradients, call);
  return tensors.finish();
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("image_prior_losses.native", TORCH_BOX(&kdkernels::cpu::image_prior_losses));
  m.impl("image_prior_losses_backward.native", TORCH_BOX(&kdkernels::cpu::image_prior_losses_backward));
  m.impl("total_variation.native", TORCH_BOX(&kdkernels::cpu::total_variation));
  m.impl("total_variation_backward.native", TORCH_BOX(&kdkernels::cpu::total_variation_backward));
  m.impl("total_variation_nd.native", TORCH_BOX(&kdkernels::cpu::total_variation_nd));
  m.impl("total_variation_nd_backward.native", TORCH_BOX(&kdkernels::cpu::total_variation_nd_backward));
}
