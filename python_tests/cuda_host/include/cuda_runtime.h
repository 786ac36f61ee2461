// Test-only stand-in for NVIDIA's header: CUDA C++ that nvcc compiles becomes C++ whose threads are fibers of one
// thread of the CPU. It has what the kernels of this project use, and nothing else compiles.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Every variable of a block lands in the one thread-local segment of the library: easy to find and to poison.
#define __shared__ static thread_local
#define KDKERNELS_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_host::dynamic_shared()

#include "cuda_host/vector_types.h"
// Vector types come first
#include "cuda_host/device.h"
#include "cuda_host/host.h"
