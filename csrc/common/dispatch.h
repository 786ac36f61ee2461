// From a dtype known at run time to a type known at compile time.
#pragma once

#include <stdexcept>

#include "stable.h"

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
