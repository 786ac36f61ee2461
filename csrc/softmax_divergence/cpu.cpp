// Divergences between softmax distributions, with the cross-entropy of hard labels, in one pass over memory.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/cpu/position_weight.h"
#include "softmax_divergence/binding.h"
#include "softmax_divergence/plan.h"

namespace kdkernels::cpu {
namespace {

using Preparation = SoftmaxPreparation<double>;

// Checks every number that counts before anything is computed, and sets what the two terms are multiplied by.
template <class S>
void set_normalizers(SoftmaxCall& call) {
  const S* const position_weight = static_cast<const S*>(call.position_weight);
  const S* const class_weight = static_cast<const S*>(call.class_weight);
  if (class_weight != nullptr) sum_of_weights("class_weight", class_weight, call.classes);
  double divergence = double(call.positions), labels = divergence;
  if (position_weight != nullptr) {
    divergence = labels = sum_of_weights("position_weight", position_weight, call.positions);
  }
  if (call.labels != nullptr) {
    double kept = labels = 0;
    for (int64_t i = 0; i < call.positions; ++i) {
      const double weight = position_weight == nullptr ? 1.0 : double(position_weight[i]);
      const int64_t label = call.labels[i];
      if (label == call.ignored_label || weight == 0) continue;
      if (label < 0 || label >= call.classes) {
        throw std::out_of_range("labels[" + std::to_string(i) + "] (in flattened order) is " + std::to_string(label) +
                                "; expected a class from 0 to " + std::to_string(call.classes - 1) +
                                " or ignore_index " + std::to_string(call.ignored_label));
      }
      kept += weight;
      labels += weight * (class_weight == nullptr ? 1.0 : double(class_weight[label]));
    }
    if (call.ignored_by_divergence) divergence = kept;
  }
  const bool by_weights = call.divide_by_weights || call.divide_by_kept;
  call.divergence_normalizer = math::inverse(by_weights ? divergence : call.divisor);
  call.label_normalizer = math::inverse(by_weights ? labels : call.divisor);
}

SoftmaxCall call_of(const Preparation& preparation, const LossArguments& options = {}) {
  SoftmaxCall call(preparation.layout(), preparation.arguments, options);
  dispatch_compute_type(call.is_double, [&](auto type) { set_normalizers<typename decltype(type)::type>(call); });
  return call;
}

double run(const SoftmaxCall& call) {
  return sum_over_chunks(call.chunks(), [&](int64_t begin, int64_t end) { return softmax_tiles(call, begin, end); });
}

// Computes the loss of a call that is complete but for where the losses of the positions go.
Tensor loss_of(SoftmaxCall& call, const Preparation& preparation, const SoftmaxTensors& given) {
  Tensor loss = preparation.new_loss(given);
  void* const loss_data = loss.mutable_data_ptr();
  if (given.reduction == "none") call.position_loss = loss_data;
  const double total = run(call);
  if (given.reduction == "none") return loss;
  dispatch_compute_type(call.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    *static_cast<S*>(loss_data) = S(total);
  });
  return loss;
}

std::tuple<Tensor, Tensor> softmax_divergence(Tensor input, Tensor target, std::optional<Tensor> labels,
                                              Tensor temperature, Tensor divergence_weight, Tensor label_weight,
                                              Tensor beta, int64_t dim, std::string divergence, std::string reduction,
                                              int64_t ignore_index, std::string save) {
  STD_TORCH_CHECK(save != "statistics", "the CPU kernels save a gradient or nothing");
  const SoftmaxTensors given{input, target, labels,     temperature, divergence_weight, label_weight,
                             beta,  dim,    divergence, reduction,   ignore_index};
  Preparation preparation(given, read_scalar);
  Tensor gradient = save == "gradient" ? new_output(input) : preparation.nothing_computed(input);
  if (save == "gradient") preparation.add(student_gradient, gradient);
  SoftmaxCall call = call_of(preparation);
  return {loss_of(call, preparation, given), gradient};
}

// Adds up the derivatives of the loss by the temperature and by the weight of the divergence.
template <class S>
void sum_scalar_gradients(const SoftmaxCall& call, S* result) {
  const S* const by_temperature = static_cast<const S*>(call.scalar_gradients);
  const S* const grad_output = static_cast<const S*>(call.grad_output);
  double temperature = 0, weight = 0;
  for (int64_t i = 0; i < call.positions && call.divergence_weight != 0; ++i) {
    if (call.labels != nullptr && call.labels[i] == call.ignored_label) continue;
    const double grad = double(grad_output[i * call.grad_stride]) * call.divergence_normalizer;
    temperature += grad * call.divergence_weight * double(by_temperature[i]);
    weight += grad * double(by_temperature[call.positions + i]);
  }
  result[0] = S(temperature);
  result[1] = S(weight);
}

std::tuple<Tensor, Tensor, Tensor> softmax_divergence_backward(
    Tensor grad_output, std::optional<Tensor> /*saved*/, Tensor input, Tensor target, std::optional<Tensor> labels,
    Tensor temperature, Tensor divergence_weight, Tensor label_weight, Tensor beta, int64_t dim, std::string divergence,
    std::string reduction, int64_t ignore_index, bool input_gradient, bool target_gradient, bool scalar_gradients) {
  Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim, divergence,
                           reduction, ignore_index},
                          read_scalar);
  preparation.check_grad_output(grad_output);
  Tensor grad_input = input_gradient ? new_output(input) : nothing(input);
  Tensor grad_target = target_gradient ? new_output(target) : nothing(target);
  if (input_gradient) preparation.add(student_gradient, grad_input);
  if (target_gradient) preparation.add(teacher_gradient, grad_target);
  const Tensor grad = torch::stable::contiguous(grad_output);
  preparation.set_grad_output(grad, reduction);
  SoftmaxCall call = call_of(preparation);
  if (!scalar_gradients) {
    run(call);
    return {grad_input, grad_target, nothing(grad)};
  }
  const Tensor of_positions = torch::stable::new_empty(grad, std::array<int64_t, 2>{2, call.positions});
  Tensor result = torch::stable::new_empty(grad, std::array<int64_t, 1>{2});
  call.scalar_gradients = of_positions.mutable_data_ptr();
  run(call);
  dispatch_compute_type(call.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    sum_scalar_gradients(call, static_cast<S*>(result.mutable_data_ptr()));
  });
  return {grad_input, grad_target, result};
}

// The arguments that softmax_loss and its backward have in common
struct LossTensors {
  SoftmaxTensors shared;
  const std::optional<Tensor>&labels, &position_weight, &class_weight;
  const Tensor& label_smoothing;
  const std::string& target_type;
  bool ignored_by_divergence;
};

// Adds what only softmax_loss has. The tensors must outlive the call.
class LossPreparation : public Preparation {
 public:
  LossArguments options;

  explicit LossPreparation(const LossTensors& given) : Preparation(given.shared, read_scalar) {
    for (const auto* weight : {&given.position_weight, &given.class_weight}) {
      STD_TORCH_CHECK(!*weight || ((*weight)->scalar_type() == dtype() && (*weight)->is_contiguous()),
                      "weights must be contiguous, in the dtype of the loss");
    }
    options.position_weight = data_of(given.position_weight);
    options.class_weight = data_of(given.class_weight);
    options.label_smoothing = read_scalar(given.label_smoothing);
    if (!(options.label_smoothing >= 0 && options.label_smoothing <= 1)) {
      throw std::invalid_argument("label_smoothing must be in [0, 1], got " + std::to_string(options.label_smoothing));
    }
    options.ignored_by_divergence = given.ignored_by_divergence;
    options.target_type = given.target_type == "log_probs" ? TargetType::log_probs
                          : given.target_type == "probs"   ? TargetType::probs
                                                           : TargetType::logits;
    options.any_sum = given.shared.divergence == "forward_kl" || given.shared.divergence == "soft_cross_entropy";
    options.divide_by_weights = given.shared.reduction == "mean";
    STD_TORCH_CHECK(!arguments.is_decoupled() || given.shared.labels, "this loss needs class indices");
    if (given.labels && !given.shared.labels) {
      probabilities_ = dense(given.labels);
      options.label_probabilities = probabilities_->const_data_ptr();
      options.label_storage = storage_of(*probabilities_);
      for (int64_t d = given.shared.dim + 1; d < probabilities_->dim(); ++d) {
        options.label_class_stride *= probabilities_->size(d);
      }
    }
  }

 private:
  std::optional<Tensor> probabilities_;
};

bool needs_unit_mass(const SoftmaxCall& call) { return call.target_type != TargetType::logits && !call.any_sum; }

// Throws unless the probabilities of every position sum to 1, up to what rounding them makes likely.
void check_masses(const SoftmaxCall& call) {
  const double tolerance = size_of(call.operand[teacher].storage) >= 4 ? 1e-3 : 2e-2;
  dispatch_compute_type(call.is_double, [&](auto type) {
    using S = typename decltype(type)::type;
    const S* const masses = static_cast<const S*>(call.masses);
    for (int64_t i = 0; i < call.positions; ++i) {
      if (std::abs(double(masses[i]) - 1) > tolerance) {
        throw std::invalid_argument("the probabilities of target at position " + std::to_string(i) +
                                    " (in flattened order) sum to " + std::to_string(double(masses[i])) +
                                    "; this divergence needs a sum of 1: normalize them, or use the forward KL "
                                    "divergence");
      }
    }
  });
}

// Class indices, or nothing where labels are probabilities
std::optional<Tensor> hard_labels(const std::optional<Tensor>& labels) {
  return labels && labels->scalar_type() == ScalarType::Long ? labels : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> softmax_loss(Tensor input, Tensor target, std::optional<Tensor> labels,
                                                std::optional<Tensor> position_weight,
                                                std::optional<Tensor> class_weight, Tensor temperature,
                                                Tensor divergence_weight, Tensor label_weight, Tensor beta,
                                                Tensor label_smoothing, int64_t dim, std::string divergence,
                                                std::string target_type, std::string reduction, int64_t ignore_index,
                                                bool ignored_by_divergence, bool parts, std::string save) {
  const std::optional<Tensor> hard = hard_labels(labels);
  const SoftmaxTensors shared{input, target, hard,       temperature, divergence_weight, label_weight,
                              beta,  dim,    divergence, reduction,   ignore_index,      true};
  LossPreparation preparation(
      {shared, labels, position_weight, class_weight, label_smoothing, target_type, ignored_by_divergence});
  Tensor gradient = save == "gradient" ? new_output(input) : preparation.nothing_computed(input);
  if (save == "gradient") preparation.add(student_gradient, gradient);
  SoftmaxCall call = call_of(preparation, preparation.options);
  Tensor every_part = preparation.nothing_computed(input);
  if (parts) {
    every_part = torch::stable::new_empty(input, preparation.parts_shape(input), preparation.dtype());
    call.parts = every_part.mutable_data_ptr();
  }
  const int64_t checked = needs_unit_mass(call) ? call.positions : 0;
  const Tensor masses = torch::stable::new_empty(input, std::array<int64_t, 1>{checked}, preparation.dtype());
  if (checked > 0) call.masses = masses.mutable_data_ptr();
  Tensor loss = loss_of(call, preparation, shared);
  if (checked > 0) check_masses(call);
  return {loss, gradient, every_part};
}

std::tuple<Tensor, Tensor> softmax_loss_backward(Tensor grad_output, Tensor input, Tensor target,
                                                 std::optional<Tensor> labels, std::optional<Tensor> position_weight,
                                                 std::optional<Tensor> class_weight, Tensor temperature,
                                                 Tensor divergence_weight, Tensor label_weight, Tensor beta,
                                                 Tensor label_smoothing, int64_t dim, std::string divergence,
                                                 std::string target_type, std::string reduction, int64_t ignore_index,
                                                 bool ignored_by_divergence, bool input_gradient,
                                                 bool target_gradient) {
  const std::optional<Tensor> hard = hard_labels(labels);
  const SoftmaxTensors shared{input, target, hard,       temperature, divergence_weight, label_weight,
                              beta,  dim,    divergence, reduction,   ignore_index,      true};
  LossPreparation preparation(
      {shared, labels, position_weight, class_weight, label_smoothing, target_type, ignored_by_divergence});
  preparation.check_grad_output(grad_output);
  STD_TORCH_CHECK(!target_gradient || target_type == "logits", "the kernels differentiate teachers given by logits");
  STD_TORCH_CHECK(!target_gradient || preparation.arguments.differentiates_target(),
                  "the kernels do not differentiate the teacher of this loss");
  Tensor grad_input = input_gradient ? new_output(input) : nothing(input);
  Tensor grad_target = target_gradient ? new_output(target) : nothing(target);
  if (input_gradient) preparation.add(student_gradient, grad_input);
  if (target_gradient) preparation.add(teacher_gradient, grad_target);
  const Tensor grad = torch::stable::contiguous(grad_output);
  preparation.set_grad_output(grad, reduction);
  run(call_of(preparation, preparation.options));
  return {grad_input, grad_target};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("softmax_divergence.native", TORCH_BOX(&kdkernels::cpu::softmax_divergence));
  m.impl("softmax_divergence_backward.native", TORCH_BOX(&kdkernels::cpu::softmax_divergence_backward));
  m.impl("softmax_loss.native", TORCH_BOX(&kdkernels::cpu::softmax_loss));
  m.impl("softmax_loss_backward.native", TORCH_BOX(&kdkernels::cpu::softmax_loss_backward));
}
