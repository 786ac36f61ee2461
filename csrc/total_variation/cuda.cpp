// Total variation and the image priors of DeepInversion.
#include <optional>
#include <tuple>
#include <vector>

#include "core/cuda/binding.h"
#include "total_variation/binding.h"
#include "total_variation/cuda_kernels.h"

namespace kdkernels::cuda {
namespace {

// Computes the sums over each image, and the losses from them.
void run_sums(const OnDevice& device, ImageCall call, const Tensor& like) {
  const ImagePlan plan = plan_images(call);
  const int64_t items = call.images * plan.items_of_image(call);
  const Tensor sums = workspace(like, (items + call.images) * int64_t(sizeof(DifferenceSums)));
  call.partial = static_cast<DifferenceSums*>(sums.mutable_data_ptr());
  call.by_image = call.partial + items;
  device.check(launch_difference_sums(call, plan, device.stream()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> image_prior_losses(Tensor image) {
  const OnDevice device(image);
  const Tensor input = readable(image);
  Tensor tv_l1 = new_result(image, {}), tv_l2 = new_result(image, {}), l2 = new_result(image, {});
  Tensor norms = new_result(image, {4 + image.size(0)});
  ImageCall call{arguments_of(input)};
  call.average_pairs();
  call.tv_l1 = tv_l1.mutable_data_ptr();
  call.tv_l2 = tv_l2.mutable_data_ptr();
  call.l2 = l2.mutable_data_ptr();
  call.norms = norms.mutable_data_ptr();
  run_sums(device, call, image);
  return {tv_l1, tv_l2, l2, norms};
}

// The gradient of images; complete(call) sets what it is computed from.
template <class Complete>
Tensor gradient_of(const OnDevice& device, const Tensor& image, const Complete& complete) {
  Tensor output = torch::stable::empty_like(image);
  if (image.numel() == 0) return output;
  InputAndOutput images = with_gradient(image, output);
  ImageCall call{arguments_of(images)};
  complete(call);
  device.check(launch_difference_gradients(call, plan_images(call), device.stream()));
  return images.finish();
}

Tensor image_prior_losses_backward(std::optional<Tensor> grad_l1, std::optional<Tensor> grad_l2,
                                   std::optional<Tensor> grad_norm, Tensor image, Tensor norms) {
  const OnDevice device(image);
  const Tensor dense = torch::stable::contiguous(norms);
  return gradient_of(device, image, [&](ImageCall& call) {
    call.average_pairs();
    call.grad_l1 = data_of(grad_l1);
    call.grad_l2 = data_of(grad_l2);
    call.grad_norm = data_of(grad_norm);
    call.given_norms = dense.const_data_ptr();
  });
}

std::tuple<Tensor, Tensor> total_variation(Tensor image, std::string norm_type, int64_t directions, double eps,
                                           std::string reduction) {
  const OnDevice device(image);
  const Tensor input = readable(image);
  ImageCall call{arguments_of(input)};
  call.set_options(norm_type, directions, eps, reduction);
  const auto by_image = [&] { return new_result(image, {image.size(0)}); };
  Tensor loss = call.loss_by_image ? by_image() : new_result(image, {});
  Tensor norms = call.losses == Losses::l2 ? by_image() : nothing(loss);
  call.tv_l1 = loss.mutable_data_ptr();
  if (call.losses == Losses::l2) call.norms = norms.mutable_data_ptr();
  run_sums(device, call, image);
  return {loss, norms};
}

Tensor total_variation_backward(Tensor grad_output, Tensor image, Tensor norms, std::string norm_type,
                                int64_t directions, double eps, std::string reduction) {
  const OnDevice device(image);
  const Tensor dense = torch::stable::contiguous(norms), grad = torch::stable::contiguous(grad_output);
  return gradient_of(device, image, [&](ImageCall& call) {
    call.set_options(norm_type, directions, eps, reduction);
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
