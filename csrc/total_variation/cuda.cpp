// Total variation and the image priors of DeepInversion.
#include "total_variation/cuda_kernels.h"

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "core/cuda/binding.h"
#include "total_variation/layout.h"

namespace kdkernels::cuda {
namespace {

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
  call.input = describe(image);
  return call;
}

void set_weights(ImageCall& call, const std::array<double, 4>& weights) {
  for (size_t k = 0; k < 4; ++k) call.weight[k] = weights[k];
}

std::array<double, 4> inverse_pairs(const Tensor& image) {
  std::array<double, 4> weights = pairs(image);
  for (double& weight : weights) weight = inverse(weight);
  return weights;
}

void set_options(ImageCall& call, const Tensor& image, const std::string& norm_type, int64_t directions, double eps,
                 const std::string& reduction) {
  call.losses = norm_type == "l1"           ? Losses::l1
                : norm_type == "l2"         ? Losses::l2
                : norm_type == "l2_squared" ? Losses::l2_squared
                                            : Losses::isotropic;
  call.directions = int(directions);
  call.eps = eps;
  call.average_images = averages_images(norm_type, reduction);
  call.loss_by_image = reduction == "none";
  set_weights(call, weights(image, norm_type, reduction));
}

// The sums of each image, and the losses made of them
void run_sums(const OnDevice& device, ImageCall call, const Tensor& like) {
  const ImagePlan plan = plan_images(call);
  const int64_t items = call.images * plan.items_of_image(call);
  const Tensor sums = workspace(like, (items + call.images) * int64_t(sizeof(DifferenceSums)));
  call.partial = static_cast<DifferenceSums*>(sums.mutable_data_ptr());
  call.by_image = call.partial + items;
  device.check(launch_difference_sums(call, plan, device.stream()));
}

Tensor result(const Tensor& image, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(image, shape, compute_dtype(image));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> image_prior_losses(Tensor image) {
  const OnDevice device(image);
  const Tensor input = readable(image);
  Tensor tv_l1 = result(image, {}), tv_l2 = result(image, {}), l2 = result(image, {});
  Tensor norms = result(image, {4 + image.size(0)});
  ImageCall call = prepare(input);
  set_weights(call, inverse_pairs(image));
  call.tv_l1 = tv_l1.mutable_data_ptr();
  call.tv_l2 = tv_l2.mutable_data_ptr();
  call.l2 = l2.mutable_data_ptr();
  call.norms = norms.mutable_data_ptr();
  run_sums(device, call, image);
  return {tv_l1, tv_l2, l2, norms};
}

// Fills the gradient of an image, by way of contiguous tensors where a layout is odd. `complete` adds to the call what
// it is relative to.
template <class Complete>
Tensor gradient_of(const OnDevice& device, const Tensor& image, const Complete& complete) {
  Tensor output = torch::stable::empty_like(image);
  if (image.numel() == 0) return output;
  const bool direct = layout_of(image) != ImageLayout::none && layout_of(output) == layout_of(image);
  const Tensor input = direct ? image : torch::stable::contiguous(image);
  Tensor target = direct ? output : torch::stable::empty_like(input);
  ImageCall call = prepare(input);
  call.output = describe(target);
  complete(call);
  device.check(launch_difference_gradients(call, plan_images(call), device.stream()));
  if (!direct) torch::stable::copy_(output, target);
  return output;
}

Tensor image_prior_losses_backward(std::optional<Tensor> grad_l1, std::optional<Tensor> grad_l2,
                                   std::optional<Tensor> grad_norm, Tensor image, Tensor norms) {
  const OnDevice device(image);
  const Tensor dense = torch::stable::contiguous(norms);
  const auto data = [](const std::optional<Tensor>& grad) { return grad ? grad->const_data_ptr() : nullptr; };
  return gradient_of(device, image, [&](ImageCall& call) {
    set_weights(call, inverse_pairs(image));
    call.grad_l1 = data(grad_l1);
    call.grad_l2 = data(grad_l2);
    call.grad_norm = data(grad_norm);
    call.given_norms = dense.const_data_ptr();
  });
}

std::tuple<Tensor, Tensor> total_variation(Tensor image, std::string norm_type, int64_t directions, double eps,
                                           std::string reduction) {
  const OnDevice device(image);
  const Tensor input = readable(image);
  Tensor loss = reduction == "none" ? result(image, {image.size(0)}) : result(image, {});
  Tensor norms = norm_type == "l2" ? result(image, {image.size(0)}) : nothing(loss);
  ImageCall call = prepare(input);
  set_options(call, image, norm_type, directions, eps, reduction);
  call.tv_l1 = loss.mutable_data_ptr();
  if (norm_type == "l2") call.norms = norms.mutable_data_ptr();
  run_sums(device, call, image);
  return {loss, norms};
}

Tensor total_variation_backward(Tensor grad_output, Tensor image, Tensor norms, std::string norm_type,
                                int64_t directions, double eps, std::string reduction) {
  const OnDevice device(image);
  const Tensor dense = torch::stable::contiguous(norms), grad = torch::stable::contiguous(grad_output);
  return gradient_of(device, image, [&](ImageCall& call) {
    set_options(call, image, norm_type, directions, eps, reduction);
    call.grad_l1 = grad.const_data_ptr();
    call.given_norms = dense.const_data_ptr();
  });
}

}  // namespace
}  // namespace kdkernels::cuda

KDKERNELS_REGISTER(m) {
  m.impl("image_prior_losses.native", TORCH_BOX(&kdkernels::cuda::image_prior_losses));
  m.impl("image_prior_losses_backward.native", TORCH_BOX(&kdkernels::cuda::image_prior_losses_backward));
  m.impl("total_variation.native", TORCH_BOX(&kdkernels::cuda::total_variation));
  m.impl("total_variation_backward.native", TORCH_BOX(&kdkernels::cuda::total_variation_backward));
}
