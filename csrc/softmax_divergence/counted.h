// The cases of the instruction counter.
#pragma once

#include "core/cpu/counting.h"
#include "softmax_divergence/plan.h"

namespace kdkernels::counted::softmax_divergence {

// Logits [outer, classes, inner], or rows [inner, classes]
struct Logits {
  const char* name;
  int64_t outer, classes, inner;
  bool rows;

  int64_t count() const { return outer * classes * inner; }

  SoftmaxLayout<max_dims> layout(Storage storage) const {
    SoftmaxLayout<max_dims> layout;
    layout.classes = classes;
    layout.positions = outer * inner;
    layout.inner = inner;
    layout.outer_dims = outer > 1 ? 1 : 0;
    layout.outer_size[0] = outer;
    for (auto& operand : layout.operand) {
      operand.storage = storage;
      operand.class_stride = rows ? 1 : inner;
      operand.inner_stride = rows ? classes : 1;
      operand.outer_stride[0] = classes * inner;
    }
    return layout;
  }
};

inline void count_divergence(const Logits& logits, Storage storage, const std::string& divergence, bool with_labels) {
  Numbers input(storage, logits.count(), 1), target(storage, logits.count(), 2);
  Numbers input_gradient(storage, logits.count()), target_gradient(storage, logits.count());
  std::vector<int64_t> labels(size_t(logits.outer * logits.inner));
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = int64_t(i * 7) % logits.classes;
  const float grad_output = 0.5f;

  SoftmaxArguments<double> arguments;
  arguments.temperature = 2;
  arguments.beta = 0.5;
  arguments.divergence_weight = 1;
  arguments.choose_divergence(divergence, arguments.beta);
  if (with_labels) {
    arguments.labels = labels.data();
    arguments.ignored_label = -100;
    arguments.label_weight = 0.5;
  }
  cpu::SoftmaxCall call(logits.layout(storage), arguments);
  call.divergence_normalizer = call.label_normalizer = 1.0 / double(call.positions);
  call.operand[student].data = input.data();
  call.operand[teacher].data = target.data();
  const std::string what = divergence + (with_labels ? " and labels, " : ", ") + logits.name + ", " + name_of(storage);
  double loss = 0;
  const auto run = [&] {
    double total = 0;
    for_each_chunk(call.chunks(),
                   [&](int64_t begin, int64_t end) { total += cpu::avx2::softmax_tiles(call, begin, end); });
    loss = total;
  };
  run_case("softmax_divergence: " + what, logits.count(), run, [&] { return loss; });
  call.operand[student_gradient].data = input_gradient.data();
  run_case("softmax_divergence: " + what + ", saves the gradient", logits.count(), run,
           [&] { return loss + input_gradient.magnitude(); });
  call.operand[teacher_gradient].data = target_gradient.data();
  call.grad_output = &grad_output;
  run_case("softmax_divergence_backward: " + what, logits.count(), run,
           [&] { return input_gradient.magnitude() + target_gradient.magnitude(); });
}

// The loss with options, and the gradient of the student
inline void count_loss(const Logits& logits, const std::string& what, LossArguments options,
                       const std::string& divergence = "forward_kl") {
  Numbers input(Storage::float32, logits.count(), 1), target(Storage::float32, logits.count(), 2);
  Numbers input_gradient(Storage::float32, logits.count());
  const size_t positions = size_t(logits.outer * logits.inner);
  std::vector<int64_t> labels(positions);
  for (size_t i = 0; i < positions; ++i) labels[i] = int64_t(i * 7) % logits.classes;
  const std::vector<float> weights(positions, 0.5f);
  if (what == "weights") options.position_weight = weights.data();

  SoftmaxArguments<double> arguments;
  arguments.temperature = 2;
  arguments.beta = 0.5;
  arguments.divergence_weight = 1;
  if (!arguments.choose_other(divergence, 0.5)) arguments.choose_divergence(divergence, 0.5);
  arguments.labels = labels.data();
  arguments.ignored_label = -100;
  arguments.label_weight = 0.5;
  cpu::SoftmaxCall call(logits.layout(Storage::float32), arguments, options);
  call.operand[student].data = input.data();
  call.operand[teacher].data = target.data();
  call.operand[student_gradient].data = input_gradient.data();
  double loss = 0;
  const auto run = [&] {
    double total = 0;
    for_each_chunk(call.chunks(),
                   [&](int64_t begin, int64_t end) { total += cpu::avx2::softmax_tiles(call, begin, end); });
    loss = total;
  };
  run_case("softmax_loss: " + what + ", " + logits.name, logits.count(), run,
           [&] { return loss + input_gradient.magnitude(); });
  const float grad_output = 0.5f;
  call.grad_output = &grad_output;
  run_case("softmax_loss_backward: " + what + ", " + logits.name, logits.count(), run,
           [&] { return input_gradient.magnitude(); });
}

inline void run_cases() {
  const Logits rows{"[16, 1000]", 1, 1000, 16, true}, few{"[256, 10]", 1, 10, 256, true};
  const Logits map{"[2, 19, 16, 32] dim 1", 2, 19, 512, false};
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    for (const Logits& logits : {rows, few, map}) {
      count_divergence(logits, storage, "forward_kl", false);
      count_divergence(logits, storage, "js", false);
      count_divergence(logits, storage, "forward_kl", true);
    }
  }
  LossArguments smoothed, log_probs;
  smoothed.label_smoothing = 0.1;
  log_probs.target_type = TargetType::log_probs;
  log_probs.any_sum = true;
  for (const Logits& logits : {rows, few, map}) {
    count_loss(logits, "weights", {});
    count_loss(logits, "smoothed labels", smoothed);
    count_loss(logits, "log-probabilities", log_probs);
  }
  for (const char* divergence : {"decoupled", "normalized", "soft_cross_entropy", "skew_kl", "entropy"}) {
    count_loss(rows, divergence, {}, divergence);
  }
  count_divergence(rows, Storage::float32, "reverse_kl", false);
  count_divergence(few, Storage::float32, "clamped_js", false);
}
inline const Cases cases(run_cases);

}  // namespace kdkernels::counted::softmax_divergence
