// How the CPU cuts the work of the divergence from a teacher's top classes, by size alone, and the kernels that do it.
// No torch.
#pragma once

#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"
#include "topk_divergence/arguments.h"

namespace kdkernels::cpu {

struct TopKCall : TopKArguments {
  bool want_masses = false;  // of the listed classes
  // By position, in the type that is computed in; the first four null where they are not asked for
  void *losses = nullptr, *target_mass = nullptr, *input_mass = nullptr, *grad_values = nullptr;
  // What the forward leaves for the backward: for each position the largest logit of the unlisted classes, then for
  // each the sum of e^((z - largest) / T) over them
  void* rest = nullptr;
  const void* grad_output = nullptr;  // one number, or one per position where grad_stride = 1
  int64_t grad_stride = 0;
  double normalizer = 1;  // the gradient is multiplied by it

  explicit TopKCall(const TopKArguments& arguments) : TopKArguments(arguments) {}

  // Where both sides are renormalized, nothing depends on the other classes.
  bool reads_rows() const { return tail != TopKTail::renormalize || want_masses; }

  // Items are positions.
  Chunks chunks() const { return Chunks(positions, classes + 16 * listed); }
};

// Computes positions begin to end and returns the weighted sum of their losses. The first position whose indices or
// values are not accepted is left in `refused`.
KDKERNELS_KERNEL(double, topk_forward, (const TopKCall& call, int64_t begin, int64_t end, int64_t* refused),
                 (call, begin, end, refused))
KDKERNELS_KERNEL(void, topk_backward, (const TopKCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
