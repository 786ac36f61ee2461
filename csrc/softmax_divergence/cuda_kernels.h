// What the kernels of the softmax divergences are asked to do, in plain numbers and pointers.
#pragma once

#include <cuda_runtime.h>

#include "core/cuda/vec.cuh"
#include "softmax_divergence/arguments.h"

namespace kdkernels::cuda {

constexpr int most_outer_dims = 6;

struct SoftmaxOperand {
  void* data = nullptr;  // null where a gradient is not asked for
  Storage storage = Storage::float32;
  int64_t class_stride = 0, inner_stride = 0;
  int64_t outer_stride[most_outer_dims] = {};
};

// What a forward saves of each position, an array over the positions each: with it a backward needs no reduction. Each
// array has a place more; in that of the first is the number of positions that count, where the loss is divided by it.
// kdkernels/ops/softmax_divergence.py knows how many they are. What a call does not need is neither written nor read.
enum Statistic {
  student_max,
  teacher_max,
  student_sum,
  teacher_sum,
  other_labels_sum,
  student_pivot,
  teacher_pivot,
  student_rest,
  teacher_rest,
  statistics
};

// Positions are all dimensions but that of the classes: runs of `inner` positions, one run for each index of the outer
// dimensions.
struct SoftmaxCall {
  SoftmaxOperand operand[operands];
  int64_t classes = 0, positions = 1, inner = 1;
  int64_t outer_size[most_outer_dims] = {};
  int outer_dims = 0;
  bool is_double = false;  // compute in double

  Divergence divergence = Divergence::kl;
  bool reverse = false;  // KL(q || p) instead of KL(p || q)
  ScalarArgument temperature, divergence_weight, label_weight, beta;
  const int64_t* labels = nullptr;  // by position
  int64_t ignored_label = 0;
  double divisor = 1;  // of the sum over the positions, unless it is the number of those that count:
  bool divide_by_kept = false;
  int64_t* kept = nullptr;            // positions that count, by block of the forward
  const void* grad_output = nullptr;  // one number, or one a position where grad_stride = 1
  int64_t grad_stride = 0;
  void* statistics = nullptr;  // [statistics, positions + 1] in the type that is computed in
  void* loss = nullptr;        // one number, or one a position where loss_stride = 1
  int64_t loss_stride = 0;
  double* partial = nullptr;  // losses, one a block of the forward

  // Whether both sides' logits are stored in 16 bits, for which plain formulas do
  bool is_plain() const { return size_of(operand[student].storage) == 2 && size_of(operand[teacher].storage) == 2; }
};

// How a kernel divides the work: `group` threads a position, `positions` at a time in a block
struct SoftmaxPlan {
  enum class Threads { one, warp, block } threads = Threads::one;
  unsigned block = 0, grid = 0;
  unsigned slices = 1;      // blocks that share a position's classes, in the backward
  int64_t positions = 1;    // of a tile, which a block takes at a time
  int64_t row = 0;          // numbers of a row in shared memory, with room for its alignment
  size_t shared_bytes = 0;  // where the logits stay on chip; 0 where they are read twice
};

SoftmaxPlan plan_softmax(const SoftmaxCall& call, bool backward, int64_t most_shared_bytes);

// Fills loss and statistics, whichever are there. `plan` is that of this call's forward; partial and kept have a number
// for each of its blocks.
cudaError_t launch_softmax_forward(const SoftmaxCall& call, const SoftmaxPlan& plan, cudaStream_t stream);
// Fills the gradients from the statistics.
cudaError_t launch_softmax_backward(const SoftmaxCall& call, const SoftmaxPlan& plan, cudaStream_t stream);

}  // namespace kdkernels::cuda
