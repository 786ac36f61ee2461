// What a call of a pointwise divergence asks for, in plain numbers: one description for every device. No torch, no
// CUDA: kernels include this.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/storage.h"

namespace kdkernels {

enum class PointwiseFormula { probabilities, log_probabilities, jensen_shannon, binary };

// What a call reads and writes
enum PointwiseOperandIndex {
  left,
  right,
  element_weight,
  incoming_gradient,
  left_result,
  right_result,
  pointwise_operands
};

// A tensor that takes part in a call; null if it does not
struct PointwiseOperand {
  void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t stride[max_dims] = {};
};

// The sizes and strides of all operands: the last dimension is the inner one, stepped through in one go.
struct PointwiseLayout {
  int dims = 0;
  int64_t size[max_dims] = {};
  PointwiseOperand operand[pointwise_operands];

  int64_t numbers() const {
    int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= size[d];
    return count;
  }

  // Sorts the dimensions from large to small strides and joins neighbours that are stepped through evenly.
  void simplify() {
    drop_dimensions_of_one();
    for (int d = 1; d < dims; ++d) {
      for (int e = d; e > 0 && largest_stride(e - 1) < largest_stride(e); --e) exchange(e - 1, e);
    }
    for (int d = dims - 2; d >= 0; --d) {
      if (joinable(d)) join(d);
    }
    // A short row costs more than one that is stepped through unevenly.
    constexpr int64_t short_row = 16;
    if (dims > 1 && size[dims - 1] < short_row) {
      const int64_t* const longest = std::max_element(size, size + dims);
      exchange(int(longest - size), dims - 1);
    }
  }

 private:
  int64_t largest_stride(int d) const {
    int64_t largest = 0;
    for (const auto& of : operand) largest = std::max(largest, of.data == nullptr ? 0 : of.stride[d]);
    return largest;
  }
  void exchange(int a, int b) {
    std::swap(size[a], size[b]);
    for (auto& of : operand) std::swap(of.stride[a], of.stride[b]);
  }
  void remove(int d) {
    for (int e = d; e + 1 < dims; ++e) exchange(e, e + 1);
    --dims;
  }
  void drop_dimensions_of_one() {
    for (int d = dims - 1; d >= 0; --d) {
      if (size[d] == 1) remove(d);
    }
  }
  bool joinable(int d) const {
    return std::all_of(operand, operand + pointwise_operands, [&](const PointwiseOperand& of) {
      return of.data == nullptr || of.stride[d] == of.stride[d + 1] * size[d + 1];
    });
  }
  void join(int d) {
    size[d + 1] *= size[d];
    remove(d);
  }
};

// What is computed
struct PointwiseArguments {
  bool is_double = false;  // compute in double
  PointwiseFormula formula = PointwiseFormula::probabilities;
  bool reversed = false, target_is_probability = false;
  double temperature = 1, beta = 0.5;

  // Sets the formula of a name; beta = 0 and 1 are the two KL.
  void choose_formula(std::string name) {
    const std::string prefix = "reverse_";
    reversed = name.compare(0, prefix.size(), prefix) == 0;
    if (reversed) name.erase(0, prefix.size());
    target_is_probability = name == "binary_kl_probs";
    if (name == "kl_log" || (name == "js_log" && (beta == 0 || beta == 1))) {
      formula = PointwiseFormula::log_probabilities;
      reversed = reversed || (name == "js_log" && beta == 1);
    } else if (name == "js_log") {
      if (!(beta > 0 && beta < 1)) throw std::invalid_argument("beta must be in [0, 1], got " + std::to_string(beta));
      formula = PointwiseFormula::jensen_shannon;
    } else if (name == "binary_kl" || target_is_probability) {
      formula = PointwiseFormula::binary;
    } else if (name != "kl") {
      throw std::invalid_argument("unknown divergence " + name);
    }
    if (!(temperature > 0 && temperature <= std::numeric_limits<double>::max())) {
      throw std::invalid_argument("temperature must be positive and finite, got " + std::to_string(temperature));
    }
  }
};

}  // namespace kdkernels
