// What bindings share: dtypes, layouts and scalars of tensors.
#pragma once

#include <optional>
#include <stdexcept>

#include "core/stable.h"
#include "core/storage.h"

namespace kdkernels {

// Calls body(Type<float>()) or body(Type<double>()) with the type that a kernel computes in.
template <class Body>
void dispatch_compute_type(bool is_double, const Body& body) {
  if (is_double) {
    body(Type<double>());
  } else {
    body(Type<float>());
  }
}

// The dtype of computed results: double where an operand is double, else float
inline ScalarType compute_dtype(bool is_double) { return is_double ? ScalarType::Double : ScalarType::Float; }
inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }
inline ScalarType compute_dtype(const Tensor& tensor) { return compute_dtype(is_double(tensor)); }

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::Half:
      return Storage::float16;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    default:
      return Storage::float32;
  }
}

// What an op returns in place of a result that was not asked for
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, std::array<int64_t, 1>{0}); }

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// A tensor, or a copy of it laid out like another one. If its memory has no gaps, the result is one row of numbers in
// memory, in any order of the dimensions.
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The input of a kernel and an output laid out like it. Where the kernel cannot take the two as they are, a contiguous
// pair stands in for them.
class InputAndOutput {
 public:
  Tensor input, output;

  InputAndOutput(const Tensor& given, const Tensor& result, bool direct)
      : input(direct ? given : torch::stable::contiguous(given)),
        output(direct ? result : torch::stable::empty_like(input)),
        result_(result),
        direct_(direct) {}

  // The result, after the kernel has run
  Tensor finish() {
    if (!direct_) torch::stable::copy_(result_, output);
    return result_;
  }

 private:
  Tensor result_;
  bool direct_;
};

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Null for a tensor that is missing
inline const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The value of a 0-dim CPU tensor of any floating-point dtype
inline double read_scalar(const Tensor& scalar) {
  const void* data = scalar.const_data_ptr();
  switch (scalar.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Float:
      return double(*static_cast<const float*>(data));
    case ScalarType::Half:
      return double(float(*static_cast<const torch::headeronly::Half*>(data)));
    case ScalarType::BFloat16:
      return double(float(*static_cast<const torch::headeronly::BFloat16*>(data)));
    default:
      throw std::invalid_argument("a scalar tensor must have a floating dtype");
  }
}

// The value of a scalar argument, or `otherwise` where only the device knows it
inline double known_value(double value, double /*otherwise*/) { return value; }

}  // namespace kdkernels
