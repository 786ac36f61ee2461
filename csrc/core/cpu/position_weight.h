// The weights of positions. A position is one softmax.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace kdkernels::cpu {

// Throws unless a weight is finite and not negative.
inline double checked_weight(const char* name, int64_t index, double weight) {
  if (!(weight >= 0 && std::isfinite(weight))) {
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "] (in flattened order) is " +
                                std::to_string(weight) + "; expected a finite number, 0 or more");
  }
  return weight;
}

// The sum of the weights, every one of which is checked
template <class S>
double sum_of_weights(const char* name, const S* weights, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += checked_weight(name, i, double(weights[i]));
  return total;
}

}  // namespace kdkernels::cpu
