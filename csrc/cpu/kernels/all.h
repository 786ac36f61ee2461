// The kernels that each instruction set compiles.
#include "softmax_divergence.h"
#include "unit.h"
