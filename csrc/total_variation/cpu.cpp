// Total variation and the image priors of DeepInversion.
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "total_variation/layout.h"
#include "total_variation/plan.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t block_numbers = 8192;  // an item has about so many numbers

// A call on images [B, C, H, W] whose layout is not `none`
ImageCall prepare(const Tensor& image) {
  ImageCall call;
  call.storage = storage_of(image);
  call.images = image.size(0);
  call.rows = image.size(2);
  const bool channels_last = layout_of(image) == ImageLayout::channels_last;
  call.step = channels_last ? image.size(1) : 1;
  call.planes = channels_last ? 1 : image.size(1);
  call.length = image.size(3) * call.step;
  if (image.numel() == 0) call.images = 0;
  call.block =
      std::clamp<int64_t>(block_numbers / std::max<int64_t>(1, call.length), 1, std::max<int64_t>(1, call.rows));
  call.blocks = (call.rows + call.block - 1) / call.block;
  call.input = describe(image);
  return call;
}

template <class Kernel>
void run(const ImageCall& call, const Kernel& kernel) {
  for_each_chunk(Chunks(call.items(), call.block * call.length),
                 [&](int64_t, int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// The sums of each image
std::vector<DifferenceSums> sums_by_image(ImageCall& call, bool isotropic, int64_t images) {
  std::vector<DifferenceSums> partial(static_cast<size_t>(call.items())), result(static_cast<size_t>(images));
  call.partial = partial.data();
  run(call, [&](const ImageCall& c, int64_t begin, int64_t end) {
    isotropic ? isotropic_sums(c, begin, end) : difference_sums(c, begin, end);
  });
  for (int64_t item = 0; item < call.items(); ++item) {
    DifferenceSums& sum = result[size_t(item / (call.planes * call.blocks))];
    const DifferenceSums& part = partial[size_t(item)];
    for (int k = 0; k < 4; ++k) {
      sum.absolute[k] += part.absolute[k];
      sum.squares[k] += part.squares[k];
    }
    sum.pixels += part.pixels;
    sum.isotropic += part.isotropic;
  }
  return result;
}

// Fills the gradient of an image with `kernel`, by way of contiguous tensors where a layout is odd.
template <class Kernel>
Tensor gradient_of(const Tensor& image, const Kernel& kernel) {
  Tensor output = new_output(image);
  const bool direct = layout_of(image) != ImageLayout::none && layout_of(output) == layout_of(image);
  const Tensor input = direct ? image : torch::stable::contiguous(image);
  Tensor target = direct ? output : new_output(input);
  ImageCall call = prepare(input);
  call.output = describe(target);
  kernel(call);
  if (!direct) torch::stable::copy_(output, target);
  return output;
}

// Tensors of a few numbers, in the dtype that results have
Tensor tensor_of(const Tensor& like, const std::vector<double>& values, bool scalar = false) {
  const std::vector<int64_t> shape = scalar ? std::vector<int64_t>{} : std::vector<int64_t>{int64_t(values.size())};
  Tensor result = torch::stable::new_empty(like, shape, compute_dtype(like));
  dispatch_compute_type(compute_dtype(like) == ScalarType::Double, [&](auto type) {
    using S = typename decltype(type)::type;
    for (size_t i = 0; i < values.size(); ++i) result.mutable_data_ptr<S>()[i] = S(values[i]);
  });
  return result;
}
std::vector<double> numbers_of(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<double> values(size_t(dense.numel()));
  dispatch_compute_type(dense.scalar_type() == ScalarType::Double, [&](auto type) {
    using S = typename decltype(type)::type;
    for (size_t i = 0; i < values.size(); ++i) values[i] = double(dense.const_data_ptr<S>()[i]);
  });
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> image_prior_losses(Tensor image) {
  const Tensor input = readable(image);
  ImageCall call = prepare(input);
  const auto images = sums_by_image(call, false, image.size(0));
  const auto count = pairs(image);
  std::vector<double> norms(4, 0.0);  // of the differences over the batch, then of each image
  double tv_l1 = 0, tv_l2 = 0, l2 = 0;
  for (size_t k = 0; k < 4; ++k) {
    double absolute = 0, squares = 0;
    for (const DifferenceSums& sums : images) {
      absolute += sums.absolute[k];
      squares += sums.squares[k];
    }
    tv_l1 += absolute * inverse(count[k]);
    tv_l2 += norms[k] = std::sqrt(squares);
  }
  for (const DifferenceSums& sums : images) {
    norms.push_back(std::sqrt(sums.pixels));
    l2 += norms.back() / double(images.size());
  }
  return {tensor_of(image, {tv_l1}, true), tensor_of(image, {tv_l2}, true), tensor_of(image, {l2}, true),
          tensor_of(image, norms)};
}

Tensor image_prior_losses_backward(std::optional<Tensor> grad_l1, std::optional<Tensor> grad_l2,
                                   std::optional<Tensor> grad_norm, Tensor image, Tensor norms) {
  const std::vector<double> norm = numbers_of(norms);
  const auto number = [](const std::optional<Tensor>& grad) { return grad ? numbers_of(*grad)[0] : 0.0; };
  const double by_l1 = number(grad_l1), by_l2 = number(grad_l2), by_norm = number(grad_norm);
  const auto count = pairs(image);
  return gradient_of(image, [&](ImageCall& call) {
    std::vector<double> pixel_scale;
    for (size_t k = 0; k < 4; ++k) {
      call.coefficients.absolute[k] = by_l1 * inverse(count[k]);
      call.coefficients.linear[k] = by_l2 * inverse(norm[k]);
    }
    for (size_t b = 4; b < norm.size(); ++b)
      pixel_scale.push_back(by_norm * inverse(norm[b]) / double(norm.size() - 4));
    call.pixel_scale = pixel_scale.data();
    call.absolute = bool(grad_l1);
    call.squares = bool(grad_l2);
    call.pixels = bool(grad_norm);
    run(call, [](const ImageCall& c, int64_t begin, int64_t end) { difference_gradients(c, begin, end); });
  });
}

std::tuple<Tensor, Tensor> total_variation(Tensor image, std::string norm_type, int64_t directions, double eps,
                                           std::string reduction) {
  const Tensor input = readable(image);
  ImageCall call = prepare(input);
  call.directions = int(directions);
  call.eps = eps;
  call.absolute = norm_type == "l1";
  call.squares = norm_type != "l1";
  call.pixels = false;
  const auto images = sums_by_image(call, norm_type == "isotropic", image.size(0));
  const auto weight = weights(image, norm_type, reduction);
  std::vector<double> values;
  double total = 0;
  for (const DifferenceSums& sums : images) {
    double value = sums.isotropic;
    for (size_t k = 0; k < size_t(directions) && norm_type != "isotropic"; ++k) {
      value += weight[k] * (call.absolute ? sums.absolute[k] : sums.squares[k]);
    }
    values.push_back(norm_type == "l2" ? std::sqrt(value) : value);
    total += values.back();
  }
  if (averages_images(norm_type, reduction)) total *= inverse(double(images.size()));
  Tensor loss = reduction == "none" ? tensor_of(image, values) : tensor_of(image, {total}, true);
  return {loss, norm_type == "l2" ? tensor_of(image, values) : nothing(loss)};
}

Tensor total_variation_backward(Tensor grad_output, Tensor image, Tensor norms, std::string norm_type,
                                int64_t directions, double eps, std::string reduction) {
  const std::vector<double> norm = numbers_of(norms), grad = numbers_of(grad_output);
  const double share = averages_images(norm_type, reduction) ? inverse(double(image.size(0))) : 1;
  const auto weight = weights(image, norm_type, reduction);
  return gradient_of(image, [&](ImageCall& call) {
    std::vector<double> scale;
    for (size_t b = 0; b < size_t(image.size(0)); ++b) {
      scale.push_back(grad[reduction == "none" ? b : 0] * share);
      if (norm_type == "l2") scale[b] *= inverse(norm[b]);
    }
    call.image_scale = scale.data();
    call.directions = int(directions);
    call.eps = eps;
    call.absolute = norm_type == "l1";
    call.squares = !call.absolute;
    call.pixels = false;
    for (size_t k = 0; k < 4; ++k) {
      call.coefficients.absolute[k] = weight[k];
      call.coefficients.linear[k] = norm_type == "l2_squared" ? 2 * weight[k] : 1;
    }
    const bool isotropic = norm_type == "isotropic";
    run(call, [&](const ImageCall& c, int64_t begin, int64_t end) {
      isotropic ? isotropic_gradients(c, begin, end) : difference_gradients(c, begin, end);
    });
  });
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("image_prior_losses.native", TORCH_BOX(&kdkernels::cpu::image_prior_losses));
  m.impl("image_prior_losses_backward.native", TORCH_BOX(&kdkernels::cpu::image_prior_losses_backward));
  m.impl("total_variation.native", TORCH_BOX(&kdkernels::cpu::total_variation));
  m.impl("total_variation_backward.native", TORCH_BOX(&kdkernels::cpu::total_variation_backward));
}
