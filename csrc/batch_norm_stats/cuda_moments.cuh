// Moments of the values of a channel, thread by thread.
#pragma once

#include "batch_norm_stats/cuda_kernels.h"

namespace kdkernels::cuda {

struct Merge {
  __device__ __forceinline__ Moments operator()(Moments a, const Moments& b) const {
    a.merge(b);
    return a;
  }
};

// Moments of the values that one thread reads. Squares are of distances from the mean of the first few values.
template <class S>
struct ThreadMoments {
  PreciseSum total;
  double shift = 0, shifted_sum = 0, squares = 0;
  int64_t count = 0;

  // Adds those of the values for which has(k) is true.
  template <int size, class Has>
  __device__ __forceinline__ void add(const S (&x)[size], const Has& has) {
    S sum = 0;
    int valid = 0;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      sum += has(k) ? x[k] : S(0);
      valid += has(k);
    }
    if (valid == 0) return;
    const S mean = valid == size ? sum * S(1.0 / size) : sum / S(valid);
    S rest = 0, around_mean = 0;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const S distance = has(k) ? x[k] - mean : S(0);
      rest += distance;
      around_mean += distance * distance;
    }
    if (count == 0) shift = double(mean);
    const double moved = double(mean) - shift, n = valid;
    shifted_sum += n * moved + double(rest);
    squares += double(around_mean) + moved * (2 * double(rest) + n * moved);
    count += valid;
    if constexpr (sizeof(S) < sizeof(double)) {
      total.sum += n * double(mean) + double(rest);  // a double has bits to spare
    } else {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        if (has(k)) total.add(x[k]);
      }
    }
  }
  __device__ __forceinline__ Moments moments() const {
    if (count == 0) return {};
    return {double(count), total, {squares - shifted_sum * shifted_sum / double(count)}};
  }
};

}  // namespace kdkernels::cuda
