// How the CPU cuts the work of a softmax divergence, by size alone, and the kernel that does it. No torch.
#pragma once

#include <algorithm>

#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"
#include "softmax_divergence/arguments.h"

namespace kdkernels::cpu {

constexpr int64_t tile_logits = 4096;    // most logits of a tile: they stay in the first-level cache
constexpr int64_t tile_positions = 128;  // and most positions of one
constexpr int64_t row_tile_logits = 2048;
constexpr int64_t few_classes = 32;  // up to here a position per lane is faster than classes in the lanes
constexpr int64_t most_lanes = 16;

enum LossPart { part_cross_entropy, part_divergence, part_logsumexp_s, part_logsumexp_t, part_entropy, part_agreement };

struct SoftmaxCall : SoftmaxLayout<max_dims>, SoftmaxArguments<double>, LossArguments {
  bool classes_in_lanes;       // else a position per lane
  int64_t tile, tiles_in_run;  // a tile is up to `tile` positions of one run
  // What the two terms of the loss and their gradients are multiplied by
  double divergence_normalizer = 1, label_normalizer = 1;
  void* position_loss = nullptr;  // reduction "none"
  // The derivatives of the divergence of each position by the temperature, then those by its weight
  void* scalar_gradients = nullptr;
  void* parts = nullptr;   // for each of LossPart the values of all positions
  void* masses = nullptr;  // sum of the probabilities of each position, where the target is probabilities

  SoftmaxCall(const SoftmaxLayout<max_dims>& layout, const SoftmaxArguments<double>& arguments,
              const LossArguments& options = {})
      : SoftmaxLayout(layout), SoftmaxArguments(arguments), LossArguments(options) {
    const auto& input = operand[student];
    classes_in_lanes = classes > few_classes && (input.class_stride == 1 || input.inner_stride != 1);
    if (classes_in_lanes) {
      tile = std::clamp<int64_t>(row_tile_logits / classes, 1, most_lanes);
    } else {
      const int64_t fitting = std::clamp<int64_t>(tile_logits / classes, 1, tile_positions);
      tile = (fitting + most_lanes - 1) / most_lanes * most_lanes;
    }
    tiles_in_run = (inner + tile - 1) / tile;
  }

  // Items are tiles.
  Chunks chunks() const { return {positions == 0 ? 0 : positions / inner * tiles_in_run, classes * tile}; }
};

// Computes tiles begin to end and returns the sum of their losses, not yet normalized.
KDKERNELS_KERNEL(double, softmax_tiles, (const SoftmaxCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
