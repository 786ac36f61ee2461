// What a call of the softmax divergences asks for, in plain numbers: one description for both devices. No torch, no
// CUDA: kernels include this.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/storage.h"

namespace kdkernels {

enum class Divergence { kl, js, clamped_js, other };
// The losses that count as other: the CPU kernels have one instance of their code for all of them.
enum class OtherLoss {
  skew_kl,
  total_variation_distance,
  soft_cross_entropy,
  entropy,
  decoupled,
  normalized,
};
// What the teacher is given by
enum class TargetType { logits, log_probs, probs };

enum OperandIndex { student, teacher, student_gradient, teacher_gradient, operands };

template <int most_dims>
struct SoftmaxOperand {
  void* data = nullptr;  // null where a gradient is not asked for
  Storage storage = Storage::float32;
  int64_t class_stride = 0, inner_stride = 0;
  int64_t outer_stride[most_dims] = {};
};

// Where the logits and gradients lie. The positions are all dimensions but that of the classes: runs of `inner`
// positions, one run for each index of the outer dimensions.
template <int most_dims>
struct SoftmaxLayout {
  SoftmaxOperand<most_dims> operand[operands];
  int64_t classes = 0, positions = 1, inner = 1;
  int64_t outer_size[most_dims] = {};
  int outer_dims = 0;

  // Joins neighbouring outer dimensions that every operand steps through evenly, drops those of size 1, and makes the
  // last one that remains the inner one.
  void join() {
    int kept = 0;
    for (int d = 0; d < outer_dims; ++d) {
      const int64_t size = outer_size[d];
      if (size == 1) continue;
      bool even = kept > 0;
      for (const auto& o : operand) even = even && o.outer_stride[kept - 1] == o.outer_stride[d] * size;
      const int at = even ? kept - 1 : kept++;
      outer_size[at] = even ? outer_size[at] * size : size;
      for (auto& o : operand) o.outer_stride[at] = o.outer_stride[d];
    }
    outer_dims = kept;
    if (kept == 0) return;
    const int last = --outer_dims;
    inner = outer_size[last];
    for (auto& o : operand) o.inner_stride = o.outer_stride[last];
  }

  // The same layout with room for fewer outer dimensions; `fewer` must be enough for it.
  template <int fewer>
  SoftmaxLayout<fewer> narrowed() const {
    SoftmaxLayout<fewer> result;
    result.classes = classes;
    result.positions = positions;
    result.inner = inner;
    result.outer_dims = outer_dims;
    for (int d = 0; d < outer_dims; ++d) result.outer_size[d] = outer_size[d];
    for (int o = 0; o < operands; ++o) {
      const auto& from = operand[o];
      auto& to = result.operand[o] = {from.data, from.storage, from.class_stride, from.inner_stride, {}};
      for (int d = 0; d < outer_dims; ++d) to.outer_stride[d] = from.outer_stride[d];
    }
    return result;
  }
};

// What is computed. `Number` is a double, or a number that only the device may know.
template <class Number>
struct SoftmaxArguments {
  bool is_double = false;  // compute in double
  Divergence divergence = Divergence::kl;
  OtherLoss other = OtherLoss::skew_kl;
  bool reverse = false;  // KL(q || p) instead of KL(p || q)
  Number temperature{}, divergence_weight{}, label_weight{}, beta{};
  const int64_t* labels = nullptr;  // by position
  int64_t ignored_label = 0;
  double divisor = 1;                 // of the sum over the positions, unless
  bool divide_by_kept = false;        // it is divided by the number of positions whose labels are not ignored
  const void* grad_output = nullptr;  // one number, or one per position where grad_stride = 1
  int64_t grad_stride = 0;

  // Sets the divergence of a name; beta = 0 and 1 are the two KL.
  void choose_divergence(const std::string& name, double known_beta) {
    reverse = name == "reverse_kl" || (name == "js" && known_beta == 1);
    if (name == "forward_kl" || name == "reverse_kl") {
      divergence = Divergence::kl;
    } else if (name == "clamped_js") {
      divergence = Divergence::clamped_js;
    } else if (name != "js") {
      throw std::invalid_argument("unknown divergence " + name);
    } else if (!(known_beta >= 0 && known_beta <= 1)) {
      throw std::invalid_argument("beta must be in [0, 1], got " + std::to_string(known_beta));
    } else {
      divergence = known_beta == 0 || known_beta == 1 ? Divergence::kl : Divergence::js;
    }
  }

  // Sets another loss, or returns false if there is none of that name; a share of 0 in a skew makes a plain KL.
  bool choose_other(const std::string& name, double alpha) {
    const bool skewed = name == "skew_kl" || name == "reverse_skew_kl";
    if (skewed && !(alpha >= 0 && alpha <= 1)) {
      throw std::invalid_argument("alpha must be in [0, 1], got " + std::to_string(alpha));
    }
    if (skewed) {
      other = OtherLoss::skew_kl;
    } else if (name == "total_variation_distance") {
      other = OtherLoss::total_variation_distance;
    } else if (name == "soft_cross_entropy") {
      other = OtherLoss::soft_cross_entropy;
    } else if (name == "entropy") {
      other = OtherLoss::entropy;
    } else if (name == "decoupled") {
      other = OtherLoss::decoupled;
    } else if (name == "normalized") {
      other = OtherLoss::normalized;
    } else {
      return false;
    }
    reverse = name == "reverse_skew_kl";
    divergence = skewed && alpha == 0 ? Divergence::kl : Divergence::other;
    return true;
  }

  // Whether the class of the label is taken apart from the others
  bool is_decoupled() const {
    return divergence == Divergence::other && (other == OtherLoss::decoupled || other == OtherLoss::normalized);
  }

  // Whether the kernels find the gradient of the teacher's logits
  bool differentiates_target() const {
    return divergence != Divergence::other || other == OtherLoss::skew_kl ||
           other == OtherLoss::total_variation_distance;
  }

  // Sets what the sum over the positions is divided by.
  void choose_divisor(const std::string& reduction, int64_t batch, int64_t positions) {
    if (reduction == "batchmean") divisor = double(batch);
    if (reduction == "mean") divisor = double(positions);
    divide_by_kept = reduction == "mean" && labels != nullptr;
  }
};

// What softmax_loss has beyond these. Weights are in the type that is computed in.
struct LossArguments {
  TargetType target_type = TargetType::logits;
  bool any_sum = false;                       // of a teacher's probabilities, which need no sum of 1
  const void* position_weight = nullptr;      // by position
  const void* class_weight = nullptr;         // by class
  const void* label_probabilities = nullptr;  // instead of labels: contiguous, in the shape of the logits
  Storage label_storage = Storage::float32;
  int64_t label_class_stride = 1;
  double label_smoothing = 0;
  bool divide_by_weights = false;     // "mean": each term is divided by the weights of what counts in it
  bool ignored_by_divergence = true;  // whether an ignored label also leaves the divergence out

  // Whether the cross-entropy has more than one label, or weights
  bool general_labels() const {
    return label_probabilities != nullptr || class_weight != nullptr || label_smoothing != 0;
  }
};

inline void check_temperature(double temperature) {
  if (!(temperature > 0 && temperature <= std::numeric_limits<double>::max())) {
    throw std::invalid_argument("temperature must be positive and finite, got " + std::to_string(temperature));
  }
}

}  // namespace kdkernels
