// What a call of the softmax divergences asks for, alike for all backends in C++. No torch, no CUDA: kernels include
// it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace kdkernels {

enum class Divergence { kl, js, clamped_js };

enum OperandIndex { student, teacher, student_gradient, teacher_gradient, operands };

struct DivergenceChoice {
  Divergence divergence;
  bool reverse;  // KL(q || p) instead of KL(p || q)
};

inline DivergenceChoice choose_divergence(const std::string& name, double beta) {
  if (name == "forward_kl") return {Divergence::kl, false};
  if (name == "reverse_kl") return {Divergence::kl, true};
  if (name == "clamped_js") return {Divergence::clamped_js, false};
  if (name != "js") throw std::invalid_argument("unknown divergence " + name);
  if (!(beta >= 0 && beta <= 1)) {
    throw std::invalid_argument("beta must be in [0, 1], got " + std::to_string(beta));
  }
  if (beta == 0) return {Divergence::kl, false};
  if (beta == 1) return {Divergence::kl, true};
  return {Divergence::js, false};
}

inline double checked_temperature(double temperature) {
  if (temperature > 0) return temperature;
  throw std::invalid_argument("temperature must be positive, got " + std::to_string(temperature));
}

// Joins neighbouring dimensions that all operands step through evenly and drops those of size 1. `strides(operand)` is
// an operand's array of strides. Returns the number of dimensions that are left.
template <class Strides>
int join_dimensions(int dims, int64_t* sizes, int count, const Strides& strides) {
  int kept = 0;
  for (int d = 0; d < dims; ++d) {
    const int64_t size = sizes[d];
    if (size == 1) continue;
    bool even = kept > 0;
    for (int o = 0; o < count; ++o) even = even && strides(o)[kept - 1] == strides(o)[d] * size;
    const int at = even ? kept - 1 : kept++;
    sizes[at] = even ? sizes[at] * size : size;
    for (int o = 0; o < count; ++o) strides(o)[at] = strides(o)[d];
  }
  return kept;
}

}  // namespace kdkernels
