// From torch's tensors to the arguments of a call: what the bindings of both devices share.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "batch_norm_act_stats/arguments.h"
#include "core/channel_layout.h"
#include "core/dispatch.h"

namespace kdkernels {

// A result of the input's shape and layout, and the tensors that are read beside the input, in one layout
class BatchNormActTensors {
 public:
  BatchNormActArguments arguments;

  BatchNormActTensors(const Tensor& original, const Tensor& result, const std::string& activation,
                      double negative_slope, bool by_image, bool unbiased)
      : big_(original, result,
             as_layout(original, prefers_rows(original)) && as_layout(result, prefers_rows(original))) {
    static_cast<ChannelInput&>(arguments) = channel_input(big_.input);
    arguments.activation = activation_of(activation, negative_slope);
    arguments.by_image = by_image;
    arguments.unbiased = unbiased;
  }

  ChannelTensor output() const { return *as_layout(big_.output, arguments.rows); }

  // A tensor that is read, or a copy in the layout of the output that lives as long as this
  ChannelTensor readable_like_output(const Tensor& tensor) {
    if (const auto direct = as_layout(tensor, arguments.rows)) return *direct;
    Tensor copy = torch::stable::empty_like(big_.output);
    torch::stable::copy_(copy, tensor);
    copies_.push_back(copy);
    return *as_layout(copies_.back(), arguments.rows);
  }

  Tensor finish() { return big_.finish(); }

 private:
  InputAndOutput big_;
  std::vector<Tensor> copies_;
};

}  // namespace kdkernels
