// What the CUDA kernels of the softmax divergences are given, and how their launches divide the work. No torch.
#pragma once

#include <cuda_runtime.h>

#include "core/cuda/vec.cuh"
#include "softmax_divergence/arguments.h"

namespace kdkernels::cuda {

constexpr int most_outer_dims = 6;

// What a forward saves of each position, an array over the positions each: with it a backward needs no reduction. Each
// array has one more place; in the first array it holds the number of positions that count, where the loss is divided
// by it. What a call does not need is neither written nor read.
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

struct SoftmaxCall : SoftmaxLayout<most_outer_dims>, SoftmaxArguments<ScalarArgument> {
  void* statistics = nullptr;  // [statistics, positions + 1] in the type that is computed in
  void* loss = nullptr;        // one number, or one per position where loss_stride = 1
  int64_t loss_stride = 0;
  double* partial = nullptr;  // losses, one per block of the forward
  int64_t* kept = nullptr;    // positions that count, by block of the forward

  // Whether both sides' logits are stored in 16 bits, for which plain formulas do
  bool is_plain() const { return size_of(operand[student].storage) == 2 && size_of(operand[teacher].storage) == 2; }
};

// How a kernel divides the work: `threads` per position, `positions` at a time in a block
struct SoftmaxPlan {
  enum class Threads { one, warp, block } threads = Threads::one;
  unsigned block = 0, grid = 0;
  unsigned slices = 1;      // blocks that share a position's classes, in the backward
  int64_t positions = 1;    // that a block takes at a time
  int64_t row = 0;          // numbers of a row in shared memory, with room for its alignment
  size_t shared_bytes = 0;  // for logits that stay on chip; 0 where they are read twice
};

SoftmaxPlan plan_softmax(const SoftmaxCall& call, bool backward, int64_t most_shared_bytes);

// Fills the loss, and the statistics if there are any. `plan` is that of this call's forward; `partial` and `kept` have
// a number for each of its blocks.
cudaError_t launch_softmax_forward(const SoftmaxCall& call, const SoftmaxPlan& plan, cudaStream_t stream);
// Fills the gradients from the statistics.
cudaError_t launch_softmax_backward(const SoftmaxCall& call, const SoftmaxPlan& plan, cudaStream_t stream);

}  // namespace kdkernels::cuda
