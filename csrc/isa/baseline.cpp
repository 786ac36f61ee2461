// Every CPU kernel, compiled for the oldest processor that torch runs on.
#define KDKERNELS_CAPABILITY baseline
#define KDKERNELS_VECTOR_BYTES 16
#include "core/cpu/unit_kernels.h"
#include "cpu_kernels_of_every_op.h"  // written by the build: C++ cannot look for files
