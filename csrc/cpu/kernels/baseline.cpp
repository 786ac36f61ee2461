// Every CPU kernel, compiled for the oldest processor that torch runs on.
#define KDKERNELS_CAPABILITY baseline
#define KDKERNELS_VECTOR_BYTES 16
#include "all.h"
