// What the CUDA kernels of the batch-norm statistics are given, and how their launches divide the work. No torch.
#pragma once

#include "batch_norm_stats/arguments.h"
#include "core/cuda/vec.cuh"

namespace kdkernels::cuda {

// A sum and what rounding cut off it, so that the mean of float64 values is rounded once
struct PreciseSum {
  double sum = 0, rest = 0;

  KDKERNELS_INLINE void add(double term) {
    const double joined = sum + term, part = joined - sum;
    rest += (sum - (joined - part)) + (term - part);
    sum = joined;
  }
  KDKERNELS_INLINE void add(const PreciseSum& other) {
    add(other.sum);
    rest += other.rest;
  }
  KDKERNELS_INLINE double value() const { return sum + rest; }
};

// The count of some values, their sum, and the sum of their squared distances from their mean
struct Moments {
  double count = 0;
  PreciseSum sum, squares;

  KDKERNELS_INLINE double mean() const { return sum.value() / count; }
  KDKERNELS_INLINE void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double distance = other.mean() - mean(), total = count + other.count;
    squares.add(distance * distance * (count * (other.count / total)));
    squares.add(other.squares);
    sum.add(other.sum);
    count = total;
  }
};

// Statistics and their gradients are one number per channel, in the type that is computed in.
struct BatchNormCall : BatchNormArguments {
  Moments* partial = nullptr;                                        // [splits, channels]
  void *mean = nullptr, *variance = nullptr, *mean_error = nullptr;  // results of the statistics
  const void *given_mean = nullptr, *given_mean_error = nullptr;     // for the gradient
  const void *grad_mean = nullptr, *grad_variance = nullptr;         // null where there is none
};

// How the work is divided. Planes: `across` threads per plane, block / across planes at a time; rows: `across` threads
// over the channels, block / across rows at a time. A statistic is split among `splits` blocks.
struct BatchNormPlan {
  unsigned block = 256, grid = 0, across = 1;
  int64_t splits = 1;
  int64_t items_of_split = 0;  // samples of a split, or rows
  int64_t tiles = 1;           // of channels, for rows
};

BatchNormPlan plan_batch_norm(const BatchNormCall& call, bool gradient);

cudaError_t launch_batch_norm_stats(const BatchNormCall& call, const BatchNormPlan& plan, cudaStream_t stream);
cudaError_t launch_batch_norm_gradient(const BatchNormCall& call, const BatchNormPlan& plan, cudaStream_t stream);

// The statistics of all layers lie one after another in flat arrays; one launch computes this many layers.
constexpr int layers_of_launch = 256;

struct StatDistanceCall {
  bool is_double = false;
  math::StatDistance distance = {};   // without the channels, which differ by layer
  const void* statistics[4] = {};     // mean, variance, running mean, running variance
  void* losses = nullptr;             // by layer
  const void* grad_losses = nullptr;  // by layer
  void* gradients[4] = {};
  int layers = 0;
  int64_t first_channel[layers_of_launch + 1] = {};
};

cudaError_t launch_stat_distances(const StatDistanceCall& call, bool backward, cudaStream_t stream);

}  // namespace kdkernels::cuda
