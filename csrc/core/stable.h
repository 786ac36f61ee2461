// The only include of torch: its stable ABI, at the version that the build asks for (TORCH_TARGET_VERSION). One
// compiled library serves that torch and every later one.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error "define TORCH_TARGET_VERSION: setup.py and CMakeLists.txt do"
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace kdkernels {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// empty_like with another dtype, which the stable API has no argument for. The layout of `like` is kept.
inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(like),         torch::stable::detail::from(std::optional<ScalarType>(dtype)),
      torch::stable::detail::from(std::nullopt), torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt), torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace kdkernels
