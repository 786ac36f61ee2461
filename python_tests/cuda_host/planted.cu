// Kernels with one bug each, and the same kernels without it: a checker that cannot fail proves nothing. Each runs in
// 4 blocks of 128 threads, with one input value and one result per thread.
#include <cuda_runtime.h>

#include <cstdint>

#if !defined(KDKERNELS_DYNAMIC_SHARED)
#define KDKERNELS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace {

constexpr int blocks = 4;
constexpr int threads = 128;
constexpr unsigned full_mask = 0xffffffff;

struct Arguments {
  const float* input;
  float* output;
  float* partials;       // one per block
  unsigned int* ticket;  // initially zero
};

__device__ int own() { return int(blockIdx.x * threads + threadIdx.x); }

template <bool planted>
__global__ void barrier_before_read(Arguments a) {
  __shared__ float copy[threads];
  copy[threadIdx.x] = a.input[own()];
  if (!planted) __syncthreads();
  a.output[own()] = copy[threads - 1 - threadIdx.x];
}

template <bool planted>
__device__ float block_sum(float value) {
  __shared__ float partial[threads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(full_mask, value, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < threads / 32; ++warp) sum += partial[warp];
  if (!planted) __syncthreads();
  return sum;
}

template <bool planted>
__global__ void barrier_before_overwrite(Arguments a) {
  const float sum = block_sum<planted>(a.input[own()]);
  a.output[own()] = sum + block_sum<planted>(3.0f * a.input[own()]);
}

template <bool planted>
__global__ void warp_barrier(Arguments a) {
  __shared__ float copy[threads];
  copy[threadIdx.x] = a.input[own()];
  if (!planted) __syncwarp();
  a.output[own()] = copy[threadIdx.x ^ 1];
}

template <bool planted>
__global__ void shuffle_for_barrier(Arguments a) {
  __shared__ float copy[threads];
  copy[threadIdx.x] = a.input[own()];
  const int other = __shfl_xor_sync(full_mask, int(threadIdx.x), 1);
  if (!planted) __syncwarp();
  a.output[own()] = copy[other];
}

template <bool planted>
__global__ void unwritten_shared(Arguments a) {
  __shared__ float bias;
  if (threadIdx.x == (planted ? unsigned(threads) : 0u)) bias = 0.0f;
  __syncthreads();
  a.output[own()] = a.input[own()] + bias;
}

enum class Part { none, first_fence, second_fence, device_scope, reset };

template <Part left_out>
__device__ void ticketed_sum(Arguments a) {
  __shared__ bool last;
  const float sum = block_sum<false>(a.input[own()]);
  if (threadIdx.x == 0) {
    a.partials[blockIdx.x] = sum;
    if (left_out == Part::device_scope) __threadfence_block();
    if (left_out != Part::device_scope && left_out != Part::first_fence) __threadfence();
    last = atomicAdd(a.ticket, 1u) == blocks - 1;
    if (left_out != Part::second_fence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float total = 0.0f;
  for (int block = 0; block < blocks; ++block) total += a.partials[block];
  for (int block = 0; block < blocks; ++block) a.output[block * threads + threadIdx.x] = total;
  if (left_out != Part::reset && threadIdx.x == 0) *a.ticket = 0;
}

template <bool planted>
__global__ void fence_before_ticket(Arguments a) {
  ticketed_sum<planted ? Part::first_fence : Part::none>(a);
}
template <bool planted>
__global__ void fence_after_ticket(Arguments a) {
  ticketed_sum<planted ? Part::second_fence : Part::none>(a);
}
template <bool planted>
__global__ void fence_of_block(Arguments a) {
  ticketed_sum<planted ? Part::device_scope : Part::none>(a);
}
template <bool planted>
__global__ void ticket_reset(Arguments a) {
  ticketed_sum<planted ? Part::reset : Part::none>(a);
}

template <bool planted>
__global__ void atomic_count(Arguments a) {
  a.output[own()] = a.input[own()];
  if (threadIdx.x != 0) return;
  if (planted) {
    *a.ticket += 1;
  } else {
    atomicAdd(a.ticket, 1u);
  }
}

template <bool planted>
__global__ void gone_before_barrier(Arguments a) {
  if (planted && threadIdx.x >= 100) return;
  __syncthreads();
  a.output[own()] = a.input[own()];
}

template <bool planted>
__global__ void different_barriers(Arguments a) {
  if (planted && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.output[own()] = a.input[own()];
}

template <bool planted>
__global__ void divergent_mask(Arguments a) {
  float value = a.input[own()];
  if (threadIdx.x % 32 < 16) value = __shfl_xor_sync(planted ? full_mask : 0x0000ffffu, value, 1);
  __syncthreads();
  a.output[own()] = value;
}

template <bool planted>
__global__ void own_lane_in_mask(Arguments a) {
  a.output[own()] = __shfl_sync(planted ? 0x0000ffffu : full_mask, a.input[own()], int(threadIdx.x % 32));
}

// The value of a lane that has left is undefined.
template <bool planted>
__global__ void shuffle_from_gone(Arguments a) {
  if (threadIdx.x % 32 == 31) return;
  a.output[own()] = __shfl_sync(planted ? full_mask : 0x7fffffffu, a.input[own()], planted ? 31 : 30);
}

template <bool planted>
__global__ void unaligned_vector(Arguments a) {
  const float* four = a.input + own() / 8 * 8 + 1;
  float4 values;
  if (planted) {
    values = *reinterpret_cast<const float4*>(four);
  } else {
    values = make_float4(four[0], four[1], four[2], four[3]);
  }
  a.output[own()] = values.x + values.y + values.z + values.w;
}

template <bool planted>
__global__ void past_tensor(Arguments a) {
  a.output[own()] = a.input[own() + (planted ? 1 : 0)];
}

template <bool planted>
__global__ void write_to_input(Arguments a) {
  a.output[own()] = a.input[own()];
  if (planted) const_cast<float*>(a.input)[own()] = 0.0f;
}

template <bool planted>
__global__ void past_dynamic_shared(Arguments a) {
  KDKERNELS_DYNAMIC_SHARED(memory);
  float* copy = reinterpret_cast<float*>(memory) + (planted ? 1 : 0);
  copy[threadIdx.x] = a.input[own()];
  a.output[own()] = copy[threadIdx.x];
}

template <bool planted>
__global__ void past_static_shared(Arguments a) {
  __shared__ float rows[2][threads];
  rows[1][threadIdx.x] = a.input[own()];
  rows[0][threadIdx.x + (planted ? 1 : 0)] = -1.0f;
  __syncthreads();
  a.output[own()] = rows[1][threadIdx.x];
}

// The host passes a null pointer.
template <bool planted>
__global__ void given_pointer(Arguments a) {
  a.output[own()] = (planted ? a.partials : a.input)[own()];
}

// Not a tail call: the sum needs the result of the deeper call.
__device__ float depth(volatile float* frame, int calls) {
  volatile float own_frame[64];
  for (int i = 0; i < 64; ++i) own_frame[i] = frame[i % 2];
  return calls == 0 ? own_frame[1] : depth(own_frame, calls - 1) + own_frame[0];
}

template <bool planted>
__global__ void bounded_stack(Arguments a) {
  volatile float frame[2] = {0.0f, a.input[own()]};
  a.output[own()] = depth(frame, planted ? 1000 : 1);
}

cudaError_t run(void (*kernel)(Arguments), const Arguments& arguments, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = threads * sizeof(float);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

__global__ void empty_kernel() {}

}  // namespace

#define LAUNCHER(kernel)                                                                                    \
  extern "C" cudaError_t planted_##kernel(int planted, const float* input, float* output, float* partials,  \
                                          unsigned int* ticket, cudaStream_t stream) {                      \
    return run(planted ? kernel<true> : kernel<false>, Arguments{input, output, partials, ticket}, stream); \
  }
LAUNCHER(barrier_before_read)
LAUNCHER(barrier_before_overwrite)
LAUNCHER(warp_barrier)
LAUNCHER(shuffle_for_barrier)
LAUNCHER(unwritten_shared)
LAUNCHER(fence_before_ticket)
LAUNCHER(fence_after_ticket)
LAUNCHER(fence_of_block)
LAUNCHER(ticket_reset)
LAUNCHER(atomic_count)
LAUNCHER(gone_before_barrier)
LAUNCHER(different_barriers)
LAUNCHER(divergent_mask)
LAUNCHER(own_lane_in_mask)
LAUNCHER(shuffle_from_gone)
LAUNCHER(unaligned_vector)
LAUNCHER(past_tensor)
LAUNCHER(write_to_input)
LAUNCHER(past_dynamic_shared)
LAUNCHER(past_static_shared)
LAUNCHER(given_pointer)
LAUNCHER(bounded_stack)

// Launches an empty kernel in any shape; a nonzero shared_limit raises the kernel's limit first.
extern "C" cudaError_t planted_empty(int64_t grid_x, int64_t grid_y, int64_t grid_z, int64_t block_x, int64_t block_y,
                                     int64_t block_z, int64_t shared_bytes, int64_t shared_limit, cudaStream_t stream) {
  if (shared_limit) {
    const cudaError_t error =
        cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_limit));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid_x), unsigned(grid_y), unsigned(grid_z));
  config.blockDim = dim3(unsigned(block_x), unsigned(block_y), unsigned(block_z));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, empty_kernel);
}
