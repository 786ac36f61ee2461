// Correct kernels built from the parts of production kernels. They are plain CUDA C++, so a run on a GPU validates the
// emulator.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if !defined(KDKERNELS_DYNAMIC_SHARED)
#define KDKERNELS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace {

constexpr int threads = 256;
constexpr int tile = 32;
constexpr int tile_rows = 8;
constexpr unsigned full_mask = 0xffffffff;

cudaLaunchConfig_t shape(dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  return config;
}

__device__ float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(full_mask, value, distance);
  return value;
}

// Returns the sum over the block in every thread; may be called again immediately.
__device__ float block_sum(float value) {
  __shared__ float partial[threads / 32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < threads / 32; ++warp) sum += partial[warp];
  __syncthreads();
  return sum;
}

// One block per row: divides its values by their sum.
__global__ void __launch_bounds__(threads)
    normalize_kernel(const float* __restrict__ rows, int64_t columns, float* __restrict__ normal) {
  const float* row = rows + blockIdx.x * columns;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < columns; i += threads) sum += row[i];
  sum = block_sum(sum);
  const float check = block_sum(threadIdx.x == 0 ? sum : 0.0f);
  for (int64_t i = threadIdx.x; i < columns; i += threads) normal[blockIdx.x * columns + i] = row[i] / check;
}

// Every block writes a partial sum; the block with the last ticket adds them in order.
__global__ void __launch_bounds__(threads) ticketed_sum_kernel(const float* __restrict__ values, int64_t count,
                                                               float* partials, unsigned int* ticket, float* total) {
  __shared__ bool last;
  float sum = 0.0f;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < count; i += int64_t(gridDim.x) * threads) {
    sum += values[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  sum = 0.0f;
  for (unsigned int i = threadIdx.x; i < gridDim.x; i += threads) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *total = sum;
    *ticket = 0;
  }
}

// Sums over each block without a block barrier: the warp with the last ticket adds the partial sums.
__global__ void __launch_bounds__(threads)
    last_warp_kernel(const float* __restrict__ values, float* __restrict__ sums) {
  __shared__ float partial[threads / 32];
  __shared__ unsigned int ticket;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) ticket = 0;
  __syncthreads();
  const float sum = warp_sum(values[blockIdx.x * threads + threadIdx.x]);
  unsigned int place = 0;
  if (lane == 0) {
    partial[threadIdx.x / 32] = sum;
    __threadfence_block();
    place = atomicAdd(&ticket, 1u);
    __threadfence_block();
  }
  __syncwarp();
  if (__shfl_sync(full_mask, place, 0) != threads / 32 - 1) return;
  const float total = warp_sum(lane < threads / 32 ? partial[lane] : 0.0f);
  if (lane == 0) sums[blockIdx.x] = total;
}

__global__ void transpose_kernel(const float* __restrict__ input, int64_t rows, int64_t columns,
                                 float* __restrict__ output) {
  KDKERNELS_DYNAMIC_SHARED(memory);
  float (*cells)[tile + 1] = reinterpret_cast<float (*)[tile + 1]>(memory);
  const int64_t column = int64_t(blockIdx.x) * tile + threadIdx.x, first_row = int64_t(blockIdx.y) * tile;
  for (int i = threadIdx.y; i < tile; i += tile_rows) {
    if (first_row + i < rows && column < columns) cells[i][threadIdx.x] = input[(first_row + i) * columns + column];
  }
  __syncthreads();
  const int64_t row = first_row + threadIdx.x, first_column = int64_t(blockIdx.x) * tile;
  for (int i = threadIdx.y; i < tile; i += tile_rows) {
    if (first_column + i < columns && row < rows) output[(first_column + i) * rows + row] = cells[threadIdx.x][i];
  }
}

// Inclusive prefix sums within each warp, by shuffles and through shared memory; -1 if the two differ or a vote is
// wrong.
__global__ void __launch_bounds__(threads) prefix_kernel(const int* __restrict__ values, int* __restrict__ sums) {
  __shared__ int copy[threads];
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane, index = blockIdx.x * threads + threadIdx.x;
  int sum = values[index];
  copy[threadIdx.x] = sum;
  __syncwarp();
  int again = 0;
  for (int i = 0; i <= lane; ++i) again += copy[first + i];
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(full_mask, sum, distance);
    if (lane >= distance) sum += below;
  }
  const unsigned odd = __ballot_sync(full_mask, sum % 2 != 0);
  bool agree = again == sum && ((odd >> lane & 1) != 0) == (sum % 2 != 0);
  agree = agree && __any_sync(full_mask, lane == 7) && !__all_sync(full_mask, lane == 7);
  // Each half of the warp separately
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) {
    agree = agree && __shfl_sync(half, lane, 3, 16) == 3;
  } else {
    agree = agree && __shfl_down_sync(half, double(lane), 2, 16) == (lane < 30 ? lane + 2 : lane);
  }
  sums[index] = agree ? sum : -1;
}

__global__ void copy_kernel(const uint4* __restrict__ input, int64_t count, uint4* __restrict__ output) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) output[i] = input[i];
}

__device__ void narrow(float value, __half* result) { *result = __float2half_rn(value); }
__device__ void narrow(float value, __nv_bfloat16* result) { *result = __float2bfloat16_rn(value); }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Narrow>
__global__ void round_trip_kernel(const float* __restrict__ input, int64_t count, Narrow* __restrict__ stored,
                                  float* __restrict__ output) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  narrow(input[i], stored + i);
  output[i] = widen(stored[i]);
}

unsigned int blocks_for(int64_t count) { return static_cast<unsigned int>((count + threads - 1) / threads); }

}  // namespace

extern "C" {

cudaError_t unit_normalize(const float* rows, int64_t count, int64_t columns, float* normal, cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(static_cast<unsigned int>(count)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, normalize_kernel, rows, columns, normal);
}

cudaError_t unit_ticketed_sum(const float* values, int64_t count, int64_t blocks, float* partials, unsigned int* ticket,
                              float* total, cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(static_cast<unsigned int>(blocks)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, ticketed_sum_kernel, values, count, partials, ticket, total);
}

cudaError_t unit_last_warp(const float* values, int64_t blocks, float* sums, cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(static_cast<unsigned int>(blocks)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, last_warp_kernel, values, sums);
}

cudaError_t unit_transpose(const float* input, int64_t rows, int64_t columns, float* output, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned int>((columns + tile - 1) / tile),
                  static_cast<unsigned int>((rows + tile - 1) / tile));
  const cudaLaunchConfig_t config = shape(grid, dim3(tile, tile_rows), tile * (tile + 1) * sizeof(float), stream);
  return cudaLaunchKernelEx(&config, transpose_kernel, input, rows, columns, output);
}

cudaError_t unit_prefix(const int* values, int64_t blocks, int* sums, cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(static_cast<unsigned int>(blocks)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, prefix_kernel, values, sums);
}

cudaError_t unit_copy(const void* input, int64_t vectors, void* output, cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(blocks_for(vectors)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, copy_kernel, static_cast<const uint4*>(input), vectors,
                            static_cast<uint4*>(output));
}

cudaError_t unit_half(const float* input, int64_t count, __half* stored, float* output, cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(blocks_for(count)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, round_trip_kernel<__half>, input, count, stored, output);
}

cudaError_t unit_bfloat16(const float* input, int64_t count, __nv_bfloat16* stored, float* output,
                          cudaStream_t stream) {
  const cudaLaunchConfig_t config = shape(dim3(blocks_for(count)), dim3(threads), 0, stream);
  return cudaLaunchKernelEx(&config, round_trip_kernel<__nv_bfloat16>, input, count, stored, output);
}
}
