// Launching kernels: one typed call, and the sizes of grids.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// The one declaration of dynamic shared memory
#if !defined(KDKERNELS_DYNAMIC_SHARED)
#define KDKERNELS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace kdkernels::cuda {

constexpr int warp_threads = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// The most blocks of a launch; with more work than that, each block takes several turns. This is enough to fill any GPU
// many times over, and few enough for adding up their partial results in no time. Tests set it low.
#if !defined(KDKERNELS_MOST_BLOCKS)
#define KDKERNELS_MOST_BLOCKS 8192
#endif
constexpr int64_t most_blocks = KDKERNELS_MOST_BLOCKS;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of blocks for some items, each block taking every gridDim.x-th item. It depends on the size alone, and so
// does the order in which partial results are added.
inline unsigned blocks_for(int64_t items) {
  return unsigned(items < 1 ? 1 : items > most_blocks ? most_blocks : items);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  constexpr size_t without_asking = 48 << 10;
  if (shared_bytes > without_asking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads, 1, 1);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace kdkernels::cuda
