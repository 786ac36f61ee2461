// Every CPU kernel, compiled for AVX2.
// The instruction set is set before the includes. Only our own inlined code may be compiled here: a function of the
// standard library could end up being called on a machine that lacks the instructions.
#if defined(__GNUC__) && defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define KDKERNELS_CAPABILITY avx2
#define KDKERNELS_VECTOR_BYTES 32
#include "core/cpu/unit_kernels.h"
#include "cpu_kernels_of_every_op.h"  // written by the build: C++ cannot look for files
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
