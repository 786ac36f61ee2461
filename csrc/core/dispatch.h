// From a dtype known at run time to a type known at compile time.
#pragma once

#include <stdexcept>

#include "core/stable.h"
#include "core/storage.h"

namespace kdkernels {

template <class T>
struct Type {
  using type = T;
};

// body(Type<float>() or Type<double>()): the type that a kernel computes in, double where an operand is double
template <class Body>
void dispatch_compute_type(bool is_double, const Body& body) {
  if (is_double) {
    body(Type<double>());
  } else {
    body(Type<float>());
  }
}

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

// The dtype of results that are computed from a tensor: 16-bit numbers are never computed with
inline ScalarType compute_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What an op returns where a result was not asked for
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, std::array<int64_t, 1>{0}); }

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// A tensor, or a copy of it laid out like another. Where memory has no gaps it is then one row of numbers, whatever the
// order of the dimensions.
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The value of a 0-dim CPU tensor of any floating dtype
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

}  // namespace kdkernels
