// Test-only stand-in for NVIDIA's header: compiles CUDA C++ as plain C++ whose threads are fibers on one CPU thread.
// It declares only what the kernels of this project use.
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
// All shared variables land in the library's thread-local segment, which is easy to find and to poison.
#define __shared__ static thread_local
#define KDKERNELS_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_host::dynamic_shared()

#include "cuda_host/vector_types.h"
// After the vector types, which both use
#include "cuda_host/device.h"
#include "cuda_host/host.h"
