// The part of an image that a thread walks down, and the neighbours of its pixels.
#pragma once

#include "total_variation/cuda_kernels.h"

namespace kdkernels::cuda {

// A pack of a row with its neighbours to the left and to the right; 0 outside the image
template <class S, int pack>
struct Window {
  S left[pack], here[pack], right[pack];
};

// The strip of a thread: a pack of some rows of a plane
template <class T>
struct Strip {
  static constexpr int pack = pack_of<T>;
  using S = Compute<T>;
  const ImageCall& call;
  int64_t image, plane, column, first, last;

  __device__ __forceinline__ Strip(const ImageCall& call, const ImagePlan& plan, int64_t item) : call(call) {
    const int64_t items = plan.columns * plan.row_blocks, part = item % items;
    const int64_t strips = blockDim.x / plan.across, row_block = part / plan.columns;
    image = item / items / call.planes;
    plane = item / items % call.planes;
    column = (part % plan.columns * plan.across + threadIdx.x % plan.across) * pack;
    first = (row_block * strips + threadIdx.x / plan.across) * plan.strip;
    last = first + plan.strip < call.rows ? first + plan.strip : call.rows;
    if (column >= call.length) last = first;  // nothing to do
  }

  // Neighbours are `step` numbers apart: next to each other where a plane is a channel.
  template <bool adjacent>
  __device__ __forceinline__ void load(int64_t row, Window<S, pack>& window) const {
    const T* const source = static_cast<const T*>(call.input.data) + image * call.input.image_stride +
                            plane * call.input.plane_stride + row * call.input.row_stride;
    const auto number = [&](int64_t i) { return i >= 0 && i < call.length ? to_compute<S>(source[i]) : S(0); };
    load_some(source + column, call.length - column, window.here);
    if constexpr (adjacent) {
      window.left[0] = number(column - 1);
      window.right[pack - 1] = number(column + pack);
#pragma unroll
      for (int k = 0; k + 1 < pack; ++k) {
        window.left[k + 1] = window.here[k];
        window.right[k] = window.here[k + 1];
      }
    } else {
#pragma unroll
      for (int k = 0; k < pack; ++k) {
        window.left[k] = number(column + k - call.step);
        window.right[k] = number(column + k + call.step);
      }
    }
  }
  __device__ __forceinline__ bool inside(int k) const { return column + k < call.length; }
  __device__ __forceinline__ bool has_left(int k) const { return column + k >= call.step; }
  __device__ __forceinline__ bool has_right(int k) const { return column + k + call.step < call.length; }
};

}  // namespace kdkernels::cuda
