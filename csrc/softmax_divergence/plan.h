// What the kernel of the softmax divergences is asked to do, in plain numbers and pointers.
#pragma once

#include "core/cpu/capability.h"
#include "core/cpu/storage.h"
#include "softmax_divergence/arguments.h"

namespace kdkernels::cpu {

struct SoftmaxOperand {
  void* data = nullptr;  // null where a gradient is not asked for
  Storage storage = Storage::float32;
  int64_t class_stride = 0;
  int64_t inner_stride = 0;
  int64_t outer_stride[max_dims] = {};
};

// Positions are all dimensions but that of the classes: runs of `inner` positions, one run for each index of the
// outer dimensions.
struct SoftmaxCall {
  SoftmaxOperand operand[operands];
  int64_t classes = 0, positions = 1, inner = 1;
  int64_t outer_size[max_dims] = {};
  int outer_dims = 0;

  bool is_double = false;              // compute in double
  bool classes_in_lanes = false;       // else a lane a position
  int64_t tile = 1, tiles_in_run = 1;  // a tile is up to `tile` positions of one run

  Divergence divergence = Divergence::kl;
  bool reverse = false;  // KL(q || p) instead of KL(p || q)
  double temperature = 1, beta = 0.5, divergence_weight = 1, label_weight = 0, normalizer = 1;
  const int64_t* labels = nullptr;  // by position
  int64_t ignored_label = 0;
  const void* grad_output = nullptr;  // one number, or one a position where grad_stride = 1
  int64_t grad_stride = 0;
  void* position_loss = nullptr;  // reduction "none"
};

// Computes tiles begin to end and returns the sum of their losses, not yet normalized.
KDKERNELS_KERNEL(double, softmax_tiles, (const SoftmaxCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
