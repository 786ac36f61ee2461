// What a call of the divergence from a teacher's top classes asks for, in plain numbers: one description for both
// devices. No torch, no CUDA: kernels include this.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/storage.h"

namespace kdkernels {

// What becomes of the classes that the teacher does not list
enum class TopKTail { bucket, renormalize, ignore };

inline TopKTail topk_tail_of(const std::string& name) {
  if (name == "bucket") return TopKTail::bucket;
  if (name == "renormalize") return TopKTail::renormalize;
  if (name == "ignore") return TopKTail::ignore;
  throw std::invalid_argument("unknown tail " + name);
}

// Rows of the student's logits, or of their gradient, in any layout
struct TopKRows {
  void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t class_stride = 0;
  int64_t outer_stride[max_dims] = {};
};

struct TopKArguments {
  // The most that probabilities may add up to: more is no rounding, but logits passed as log-probabilities.
  static constexpr double most_mass = 1.1;

  bool is_double = false;                          // compute in double
  int64_t positions = 1, classes = 0, listed = 0;  // `listed` classes at each position
  int64_t outer_size[max_dims] = {};
  int outer_dims = 0;
  TopKRows input, grad_input;
  const void* values = nullptr;      // [positions, listed] log-probabilities; -inf is padding
  const int64_t* indices = nullptr;  // [positions, listed]
  const void* weights = nullptr;     // by position; null for a weight of 1
  double temperature = 1;
  TopKTail tail = TopKTail::bucket;
  bool reverse = false;  // the divergence of the student from the teacher

  // The offset of a position's row
  int64_t offset_of(const TopKRows& rows, int64_t position) const {
    int64_t offset = 0;
    for (int d = outer_dims - 1; d >= 0; --d) {
      offset += position % outer_size[d] * rows.outer_stride[d];
      position /= outer_size[d];
    }
    return offset;
  }
};

inline void check_temperature_of_topk(double temperature) {
  if (!(temperature > 0 && temperature <= std::numeric_limits<double>::max())) {
    throw std::invalid_argument("temperature must be positive and finite, got " + std::to_string(temperature));
  }
}

}  // namespace kdkernels
