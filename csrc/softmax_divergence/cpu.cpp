// Divergences between softmax distributions, with the cross-entropy of hard labels, in one pass over memory.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "core/cpu/memory.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "softmax_divergence/plan.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t tile_logits = 4096;    // about so many logits in a tile: they stay in the first-level cache
constexpr int64_t tile_positions = 128;  // and at most so many positions
constexpr int64_t row_tile_logits = 2048;
constexpr int64_t few_classes = 32;  // up to here a lane a position is faster than classes in the lanes
constexpr int64_t max_lanes = 16;

struct Arguments {
  const Tensor &input, &target;
  const std::optional<Tensor>& labels;
  const Tensor &temperature, &divergence_weight, &label_weight, &beta;
  int64_t dim;
  const std::string &divergence, &reduction;
  int64_t ignore_index;
};

// Labels are read before anything else: their range is checked and those that count are counted.
int64_t count_valid(const int64_t* labels, int64_t positions, int64_t classes, int64_t ignore_index) {
  int64_t valid = 0;
  for (int64_t i = 0; i < positions; ++i) {
    if (labels[i] == ignore_index) continue;
    if (labels[i] < 0 || labels[i] >= classes) {
      throw std::out_of_range("labels[" + std::to_string(i) + "] (in flattened order) is " + std::to_string(labels[i]) +
                              "; expected a class from 0 to " + std::to_string(classes - 1) + " or ignore_index " +
                              std::to_string(ignore_index));
    }
    ++valid;
  }
  return valid;
}

// A call in the making: its shape comes from the student's logits, operands are added one by one.
class Preparation {
 public:
  Preparation(const Arguments& a) : dim_(a.dim) {
    call_.classes = a.input.size(a.dim);
    for (int64_t d = 0; d < a.input.dim(); ++d) {
      if (d == dim_) continue;
      call_.positions *= a.input.size(d);
      call_.outer_size[call_.outer_dims++] = a.input.size(d);
    }
    read_scalars(a);
    if (a.labels) labels_ = torch::stable::contiguous(*a.labels);
    if (a.labels) call_.labels = labels_.const_data_ptr<int64_t>();
    call_.ignored_label = a.ignore_index;
    const int64_t valid =
        a.labels ? count_valid(call_.labels, call_.positions, call_.classes, a.ignore_index) : call_.positions;
    const bool batch = a.reduction == "batchmean" && a.input.dim() > 1;
    if (batch || a.reduction == "mean") {
      const int64_t divisor = batch ? a.input.size(0) : valid;
      call_.normalizer = divisor > 0 ? 1.0 / double(divisor) : 0.0;
    }
    call_.is_double = a.input.scalar_type() == ScalarType::Double || a.target.scalar_type() == ScalarType::Double;
    add(student, a.input);
    add(teacher, a.target);
  }

  void add(OperandIndex index, const Tensor& tensor) {
    SoftmaxOperand& operand = call_.operand[index];
    operand.data = const_cast<void*>(tensor.const_data_ptr());
    operand.storage = storage_of(tensor);
    operand.class_stride = tensor.stride(dim_);
    for (int64_t d = 0, kept = 0; d < tensor.dim(); ++d) {
      if (d != dim_) operand.outer_stride[kept++] = tensor.stride(d);
    }
  }

  // The call with its runs and tiles laid out
  SoftmaxCall& finish() {
    call_.outer_dims = join_dimensions(call_.outer_dims, call_.outer_size, operands,
                                       [&](int o) { return call_.operand[o].outer_stride; });
    if (call_.outer_dims > 0) {
      const int last = --call_.outer_dims;
      call_.inner = call_.outer_size[last];
      for (SoftmaxOperand& operand : call_.operand) operand.inner_stride = operand.outer_stride[last];
    }
    const SoftmaxOperand& input = call_.operand[student];
    call_.classes_in_lanes = call_.classes > few_classes && (input.class_stride == 1 || input.inner_stride != 1);
    if (call_.classes_in_lanes) {
      call_.tile = std::clamp<int64_t>(row_tile_logits / call_.classes, 1, max_lanes);
    } else {
      const int64_t fitting = std::clamp<int64_t>(tile_logits / call_.classes, 1, tile_positions);
      call_.tile = (fitting + max_lanes - 1) / max_lanes * max_lanes;
    }
    call_.tiles_in_run = (call_.inner + call_.tile - 1) / call_.tile;
    return call_;
  }

  const SoftmaxCall& call() const { return call_; }

 private:
  void read_scalars(const Arguments& a) {
    call_.temperature = checked_temperature(read_scalar(a.temperature));
    call_.beta = read_scalar(a.beta);
    call_.divergence_weight = read_scalar(a.divergence_weight);
    call_.label_weight = read_scalar(a.label_weight);
    const DivergenceChoice choice = choose_divergence(a.divergence, call_.beta);
    call_.divergence = choice.divergence;
    call_.reverse = choice.reverse;
  }

  int64_t dim_;
  SoftmaxCall call_;
  Tensor labels_;
};

double run(const SoftmaxCall& call) {
  if (call.positions == 0) return 0;
  const int64_t tiles = call.positions / call.inner * call.tiles_in_run;
  return sum_over_chunks(Chunks(tiles, call.classes * call.tile),
                         [&](int64_t begin, int64_t end) { return softmax_tiles(call, begin, end); });
}

std::tuple<Tensor, Tensor> softmax_divergence(Tensor input, Tensor target, std::optional<Tensor> labels,
                                              Tensor temperature, Tensor divergence_weight, Tensor label_weight,
                                              Tensor beta, int64_t dim, std::string divergence, std::string reduction,
                                              int64_t ignore_index, std::string save) {
  STD_TORCH_CHECK(save != "statistics", "the CPU kernels save a gradient or nothing");
  const bool save_gradient = save == "gradient";
  Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim, divergence,
                           reduction, ignore_index});
  const bool is_double = preparation.call().is_double;
  std::vector<int64_t> loss_shape;
  for (int64_t d = 0; reduction == "none" && d < input.dim(); ++d) {
    if (d != dim) loss_shape.push_back(input.size(d));
  }
  Tensor loss = torch::stable::new_empty(input, loss_shape, is_double ? ScalarType::Double : ScalarType::Float);
  Tensor gradient = save_gradient ? new_output(input) : nothing(loss);
  if (save_gradient) preparation.add(student_gradient, gradient);
  SoftmaxCall& call = preparation.finish();
  void* const loss_data = loss.mutable_data_ptr();
  if (reduction == "none") call.position_loss = loss_data;
  const double total = run(call) * call.normalizer;
  if (reduction != "none") {
    if (is_double) {
      *static_cast<double*>(loss_data) = total;
    } else {
      *static_cast<float*>(loss_data) = float(total);
    }
  }
  return {loss, gradient};
}

std::tuple<Tensor, Tensor> softmax_divergence_backward(
    Tensor grad_output, std::optional<Tensor> /*statistics*/, Tensor input, Tensor target, std::optional<Tensor> labels,
    Tensor temperature, Tensor divergence_weight, Tensor label_weight, Tensor beta, int64_t dim, std::string divergence,
    std::string reduction, int64_t ignore_index, bool input_gradient, bool target_gradient) {
  Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim, divergence,
                           reduction, ignore_index});
  STD_TORCH_CHECK(grad_output.scalar_type() == (preparation.call().is_double ? ScalarType::Double : ScalarType::Float),
                  "grad_output must have the dtype of the loss");
  Tensor grad_input = input_gradient ? new_output(input) : nothing(input);
  Tensor grad_target = target_gradient ? new_output(target) : nothing(target);
  if (input_gradient) preparation.add(student_gradient, grad_input);
  if (target_gradient) preparation.add(teacher_gradient, grad_target);
  SoftmaxCall& call = preparation.finish();
  const Tensor grad = torch::stable::contiguous(grad_output);
  call.grad_output = grad.const_data_ptr();
  call.grad_stride = reduction == "none" ? 1 : 0;
  run(call);
  return {grad_input, grad_target};
}

}  // namespace
}  // namespace kdkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("softmax_divergence.native", TORCH_BOX(&kdkernels::cpu::softmax_divergence));
  m.impl("softmax_divergence_backward.native", TORCH_BOX(&kdkernels::cpu::softmax_divergence_backward));
}
