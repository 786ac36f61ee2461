// Sums and maxima over the threads of a group: one thread, a warp, or a block. The order is fixed, and every thread of
// the group gets the result.
#pragma once

#include <cstring>

#include "core/cuda/launch.cuh"

namespace kdkernels::cuda {

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// The value of another lane, a number or a struct of numbers, word by word
template <class V>
__device__ __forceinline__ V from_lane_xor(V value, int mask) {
  constexpr int words = int(sizeof(V) / sizeof(unsigned));
  static_assert(sizeof(V) % sizeof(unsigned) == 0, "values of whole words");
  unsigned word[words];
  memcpy(word, &value, sizeof(V));
#pragma unroll
  for (int w = 0; w < words; ++w) word[w] = __shfl_xor_sync(all_lanes, word[w], mask);
  memcpy(&value, word, sizeof(V));
  return value;
}

template <class V, class Combine>
__device__ __forceinline__ V reduce_warp(V value, const Combine& combine) {
#pragma unroll
  for (int distance = warp_threads / 2; distance > 0; distance /= 2) {
    value = combine(value, from_lane_xor(value, distance));
  }
  return value;
}

// Reduces over the block, through a warp's worth of shared memory for each value. All threads must call it.
template <class V, int count, class Combine>
__device__ __forceinline__ void reduce_block(V (&values)[count], const Combine& combine) {
  // Bytes, because a shared variable cannot have a constructor.
  __shared__ __align__(16) unsigned char memory[count * warp_threads * sizeof(V)];
  V* const of_warps = reinterpret_cast<V*>(memory);
  const int lane = int(threadIdx.x) % warp_threads, warp = int(threadIdx.x) / warp_threads;
  const int warps = int(blockDim.x) / warp_threads;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    values[k] = reduce_warp(values[k], combine);
    if (lane == 0) of_warps[k * warp_threads + warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) {
    V total = of_warps[k * warp_threads];
    for (int w = 1; w < warps; ++w) total = combine(total, of_warps[k * warp_threads + w]);
    values[k] = total;
  }
  __syncthreads();  // before the next reduction writes here
}

// The threads that work on one item together
enum class Group { thread, warp, block };

template <Group group>
__device__ __forceinline__ int group_threads() {
  return group == Group::thread ? 1 : group == Group::warp ? warp_threads : int(blockDim.x);
}
template <Group group>
__device__ __forceinline__ int thread_in_group() {
  return group == Group::thread ? 0 : group == Group::warp ? int(threadIdx.x) % warp_threads : int(threadIdx.x);
}
template <Group group>
__device__ __forceinline__ int group_in_block() {
  return group == Group::thread ? int(threadIdx.x) : group == Group::warp ? int(threadIdx.x) / warp_threads : 0;
}

template <Group group, class V, int count, class Combine>
__device__ __forceinline__ void reduce(V (&values)[count], const Combine& combine) {
  if constexpr (group == Group::warp) {
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] = reduce_warp(values[k], combine);
  } else if constexpr (group == Group::block) {
    reduce_block(values, combine);
  }
}

}  // namespace kdkernels::cuda
