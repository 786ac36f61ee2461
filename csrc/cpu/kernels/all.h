// The kernels that each instruction set compiles.
#include "batch_norm_stats.h"
#include "gradient_reversal.h"
#include "softmax_divergence.h"
#include "total_variation.h"
#include "unit.h"
