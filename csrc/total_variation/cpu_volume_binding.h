// From torch's tensors to a call of the total variation of volumes.
#pragma once

#include <string>
#include <vector>

#include "core/dispatch.h"
#include "total_variation/cpu_volume_plan.h"

namespace kdkernels::cpu {

// The size and the stride of an axis of a volume [B, C, ...]; of one that it lacks, 1 and 0
inline int64_t size_of_axis(const Tensor& volume, int axis) {
  const int64_t d = volume.dim() - 3 + axis;
  return d < 2 ? 1 : volume.size(d);
}
inline int64_t stride_of_axis(const Tensor& volume, int axis) {
  const int64_t d = volume.dim() - 3 + axis;
  return d < 2 ? 0 : volume.stride(d);
}

enum class VolumeLayout { planes, channels_last, none };

// Rows that lie in memory without gaps: of one channel, or of numbers with their channels side by side
inline VolumeLayout layout_of_volume(const Tensor& volume) {
  const int64_t channels = volume.size(1), length = size_of_axis(volume, 2);
  if (channels > 1 && volume.stride(1) == 1 && (length == 1 || stride_of_axis(volume, 2) == channels)) {
    return VolumeLayout::channels_last;
  }
  return length == 1 || stride_of_axis(volume, 2) == 1 ? VolumeLayout::planes : VolumeLayout::none;
}

// Dimensions of size 1 may be those of a mask for every image and channel.
inline VolumeTensor describe_volume(const Tensor& volume) {
  const auto stride = [&](int64_t d) { return volume.size(d) == 1 ? 0 : volume.stride(d); };
  return {const_cast<void*>(volume.const_data_ptr()), stride(0), stride(1), stride_of_axis(volume, 0),
          stride_of_axis(volume, 1)};
}

// A volume, its gradient where there is one, and its mask, which lie in memory alike
class VolumeTensors {
 public:
  VolumeArguments arguments;

  explicit VolumeTensors(const Tensor& given, const std::optional<Tensor>& mask) : input_(given) {
    if (layout_of_volume(given) == VolumeLayout::none || !take_mask(mask)) {
      input_ = torch::stable::contiguous(given);
      take_mask(mask);
    }
    const bool channels_last = layout_of_volume(input_) == VolumeLayout::channels_last;
    arguments.storage = storage_of(input_);
    arguments.images = input_.size(0);
    arguments.planes = channels_last ? 1 : input_.size(1);
    arguments.step = channels_last ? input_.size(1) : 1;
    arguments.slices = size_of_axis(input_, 0);
    arguments.rows = size_of_axis(input_, 1);
    arguments.length = size_of_axis(input_, 2) * arguments.step;
    arguments.input = describe_volume(input_);
    if (mask_) arguments.mask = describe_volume(*mask_);
  }

  // The memory that the gradient is written to: that of the result, or where it lies otherwise, of a copy
  void set_output(const Tensor& result) {
    result_ = result;
    direct_ = layout_of_volume(result) == layout_of_volume(input_);
    output_ = direct_ ? result : torch::stable::empty_like(input_);
    arguments.output = describe_volume(*output_);
  }
  Tensor finish() {
    if (!direct_) torch::stable::copy_(*result_, *output_);
    return *result_;
  }

 private:
  // Lays out the mask like the input; false where that is not possible.
  bool take_mask(const std::optional<Tensor>& mask) {
    if (!mask) return true;
    if (layout_of_volume(input_) == VolumeLayout::channels_last) {
      mask_ = empty_like(input_, ScalarType::Bool);
      torch::stable::copy_(*mask_, *mask);
      return layout_of_volume(*mask_) == VolumeLayout::channels_last;
    }
    const bool has_rows = size_of_axis(*mask, 2) == 1 || stride_of_axis(*mask, 2) == 1;
    mask_ = has_rows ? *mask : torch::stable::contiguous(*mask);
    return true;
  }

  Tensor input_;
  std::optional<Tensor> mask_, output_, result_;
  bool direct_ = true;
};

// The options of a call: `scale` and `threshold` have one number for each axis.
struct VolumeOptions {
  std::string norm_type, average, reduction;

  PairNorm norm() const {
    return norm_type == "l1"          ? PairNorm::absolute
           : norm_type == "huber"     ? PairNorm::huber
           : norm_type == "isotropic" ? PairNorm::isotropic
                                      : PairNorm::square;
  }

  // The variation of each image, and what it multiplies the slopes of each axis by
  void reduce(const VolumeArguments& arguments, const std::vector<VolumeSums>& sums, bool masked,
              std::vector<double>& values, std::vector<VolumeCoefficients>& coefficients) const {
    const double share = reduction == "mean" ? math::inverse(double(sums.size())) : 1;
    VolumeSums batch;
    for (const VolumeSums& image : sums) batch.add(image);
    for (const VolumeSums& image : sums) {
      double value = 0;
      VolumeCoefficients factor;
      for (int axis = 0; axis < 3; ++axis) {
        const double all = double(arguments.pairs(axis));
        const double pairs = average == "sample"  ? (masked ? double(image.pairs[axis]) : all)
                             : average == "batch" ? (masked ? double(batch.pairs[axis]) : all * double(sums.size()))
                                                  : 1;
        factor.axis[axis] = arguments.scale[axis] * math::inverse(pairs);
        value += image.terms[axis] * (norm_type == "isotropic" ? 1 : factor.axis[axis]);
      }
      if (norm_type == "l2") value = std::sqrt(value);
      for (double& one : factor.axis) {
        one = norm_type == "isotropic" ? share
              : norm_type == "l2"      ? share * one * math::inverse(value)
                                       : share * one * (norm_type == "l2_squared" ? 2 : 1);
      }
      values.push_back(value);
      coefficients.push_back(factor);
    }
  }
};

}  // namespace kdkernels::cpu
