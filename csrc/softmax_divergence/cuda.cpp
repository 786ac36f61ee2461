// Divergences between softmax distributions, with the cross-entropy of hard labels.
#include "softmax_divergence/cuda_kernels.h"

#include <optional>
#include <tuple>
#include <vector>

#include "core/cuda/binding.h"

namespace kdkernels::cuda {
namespace {

struct Arguments {
  const Tensor &input, &target;
  const std::optional<Tensor>& labels;
  const Tensor &temperature, &divergence_weight, &label_weight, &beta;
  int64_t dim;
  const std::string &divergence, &reduction;
  int64_t ignore_index;
};

// A call in the making: its shape comes from the student's logits, operands are added one by one.
class Preparation {
 public:
  explicit Preparation(const Arguments& a) : dim_(a.dim) {
    call_.classes = a.input.size(dim_);
    for (int64_t d = 0; d < a.input.dim(); ++d) {
      if (d == dim_) continue;
      call_.positions *= a.input.size(d);
      sizes_.push_back(a.input.size(d));
    }
    read_scalars(a);
    if (a.labels) {
      labels_ = torch::stable::contiguous(*a.labels);
      call_.labels = labels_.const_data_ptr<int64_t>();
    }
    call_.ignored_label = a.ignore_index;
    const bool batch = a.reduction == "batchmean" && a.input.dim() > 1;
    if (batch) call_.divisor = double(a.input.size(0));
    if (a.reduction == "mean") {
      call_.divisor = double(call_.positions);
      call_.divide_by_kept = bool(a.labels);
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
    strides_[index].clear();
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (d != dim_) strides_[index].push_back(tensor.stride(d));
    }
  }

  // The call with its runs laid out; nothing if its dimensions are too many to be told apart in a kernel
  std::optional<SoftmaxCall> finish() const {
    SoftmaxCall call = call_;
    std::vector<int64_t> sizes = sizes_, strides[operands];
    for (int o = 0; o < operands; ++o) {
      strides[o] = strides_[o];
      strides[o].resize(sizes.size(), 0);  // of an operand that is not there
    }
    int dims = join_dimensions(int(sizes.size()), sizes.data(), operands, [&](int o) { return strides[o].data(); });
    call.inner = 1;
    if (dims > 0) {
      call.inner = sizes[size_t(--dims)];
      for (int o = 0; o < operands; ++o) call.operand[o].inner_stride = strides[o][size_t(dims)];
    }
    if (dims > most_outer_dims) return std::nullopt;
    call.outer_dims = dims;
    for (int d = 0; d < dims; ++d) {
      call.outer_size[d] = sizes[size_t(d)];
      for (int o = 0; o < operands; ++o) call.operand[o].outer_stride[d] = strides[o][size_t(d)];
    }
    return call;
  }

  const SoftmaxCall& call() const { return call_; }

 private:
  void read_scalars(const Arguments& a) {
    call_.temperature = scalar_argument(a.temperature);
    call_.beta = scalar_argument(a.beta);
    call_.divergence_weight = scalar_argument(a.divergence_weight);
    call_.label_weight = scalar_argument(a.label_weight);
    // What lies on the device is seen by the kernel alone; it gives NaN where it is wrong.
    if (call_.temperature.device == nullptr) checked_temperature(call_.temperature.value);
    const double beta = call_.beta.device == nullptr ? call_.beta.value : 0.5;
    const DivergenceChoice choice = choose_divergence(a.divergence, beta);
    call_.divergence = choice.divergence;
    call_.reverse = choice.reverse;
  }

  int64_t dim_;
  SoftmaxCall call_;
  std::vector<int64_t> sizes_, strides_[operands];
  Tensor labels_;
};

SoftmaxCall finished(const Preparation& preparation) {
  const std::optional<SoftmaxCall> call = preparation.finish();
  STD_TORCH_CHECK(call, "logits whose positions cannot be described by ", most_outer_dims + 1,
                  " strides; make them contiguous");
  return *call;
}

// Runs the forward for what of loss and statistics is there.
void run_forward(const OnDevice& device, SoftmaxCall call, const Tensor& like) {
  const SoftmaxPlan plan = plan_softmax(call, false, device.most_shared_bytes());
  const Tensor partial = workspace(like, int64_t(plan.grid) * int64_t(sizeof(double) + sizeof(int64_t)));
  call.partial = static_cast<double*>(partial.mutable_data_ptr());
  call.kept = reinterpret_cast<int64_t*>(call.partial + plan.grid);
  device.check(launch_softmax_forward(call, plan, device.stream()));
}

Tensor new_statistics(const Tensor& like, const SoftmaxCall& call) {
  return torch::stable::new_empty(like, std::array<int64_t, 2>{statistics, call.positions + 1},
                                  call.is_double ? ScalarType::Double : ScalarType::Float);
}

std::tuple<Tensor, Tensor> softmax_divergence(Tensor input, Tensor target, std::optional<Tensor> labels,
                                              Tensor temperature, Tensor divergence_weight, Tensor label_weight,
                                              Tensor beta, int64_t dim, std::string divergence, std::string reduction,
                                              int64_t ignore_index, std::string save) {
  STD_TORCH_CHECK(save != "gradient", "the CUDA kernels save statistics or nothing");
  const OnDevice device(input);
  const Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim,
                                 divergence, reduction, ignore_index});
  SoftmaxCall call = finished(preparation);
  std::vector<int64_t> loss_shape;
  for (int64_t d = 0; reduction == "none" && d < input.dim(); ++d) {
    if (d != dim) loss_shape.push_back(input.size(d));
  }
  Tensor loss = torch::stable::new_empty(input, loss_shape, call.is_double ? ScalarType::Double : ScalarType::Float);
  Tensor saved = save == "statistics" ? new_statistics(input, call) : nothing(loss);
  call.loss = loss.mutable_data_ptr();
  call.loss_stride = reduction == "none" ? 1 : 0;
  if (save == "statistics") call.statistics = saved.mutable_data_ptr();
  if (call.positions > 0 || reduction != "none") run_forward(device, call, input);
  return {loss, saved};
}

std::tuple<Tensor, Tensor> softmax_divergence_backward(Tensor grad_output, std::optional<Tensor> saved, Tensor input,
                                                       Tensor target, std::optional<Tensor> labels, Tensor temperature,
                                                       Tensor divergence_weight, Tensor label_weight, Tensor beta,
                                                       int64_t dim, std::string divergence, std::string reduction,
                                                       int64_t ignore_index, bool input_gradient,
                                                       bool target_gradient) {
  const OnDevice device(input);
  Preparation preparation({input, target, labels, temperature, divergence_weight, label_weight, beta, dim, divergence,
                           reduction, ignore_index});
  const bool is_double = preparation.call().is_double;
  STD_TORCH_CHECK(grad_output.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                  "grad_output must have the dtype of the loss");
  Tensor grad_input = input_gradient ? torch::stable::empty_like(input) : nothing(input);
  Tensor grad_target = target_gradient ? torch::stable::empty_like(target) : nothing(target);
  if (preparation.call().positions == 0) return {grad_input, grad_target};
  const Tensor statistics = saved ? *saved : new_statistics(input, preparation.call());
  if (!saved) {
    SoftmaxCall call = finished(preparation);
    const Tensor loss = torch::stable::new_empty(input, std::array<int64_t, 1>{1}, grad_output.scalar_type());
    call.loss = loss.mutable_data_ptr();
    call.statistics = statistics.mutable_data_ptr();
    run_forward(device, call, input);
  }
  if (input_gradient) preparation.add(student_gradient, grad_input);
  if (target_gradient) preparation.add(teacher_gradient, grad_target);
  SoftmaxCall call = finished(preparation);
  const Tensor grad = torch::stable::contiguous(grad_output);
  call.statistics = const_cast<void*>(statistics.const_data_ptr());
  call.grad_output = grad.const_data_ptr();
  call.grad_stride = reduction == "none" ? 1 : 0;
  device.check(launch_softmax_backward(call, plan_softmax(call, true, 0), device.stream()));
  return {grad_input, grad_target};
}

}  // namespace
}  // namespace kdkernels::cuda

KDKERNELS_REGISTER(m) {
  m.impl("softmax_divergence.native", TORCH_BOX(&kdkernels::cuda::softmax_divergence));
  m.impl("softmax_divergence_backward.native", TORCH_BOX(&kdkernels::cuda::softmax_divergence_backward));
}
