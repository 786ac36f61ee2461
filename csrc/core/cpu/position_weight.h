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
  // Several sums, which the compiler keeps in the lanes of a vector, in an order that does not depend on it
  constexpr int64_t sums = 8;
  double partial[sums] = {};
  int64_t i = 0;
  for (; i + sums <= count; i += sums) {
    for (int64_t k = 0; k < sums; ++k) partial[k] += double(weights[i + k]);
  }
  for (; i < count; ++i) partial[0] += double(weights[i]);
  double total = 0, least = 0;
  for (double sum : partial) total += sum;
  for (int64_t k = 0; k < count; ++k) least = double(weights[k]) < least ? double(weights[k]) : least;
  // A weight that is infinite or NaN shows in the sum.
  if (least < 0 || !std::isfinite(total)) {
    for (int64_t k = 0; k < count; ++k) checked_weight(name, k, double(weights[k]));
  }
  return total;
}

}  // namespace kdkernels::cpu
