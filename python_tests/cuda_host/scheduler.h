// Interface of the scheduler for the host functions
#pragma once

#include "runtime.h"

namespace cuda_host {

// By index, by descending index, at random, or by random warp priorities, where one warp runs as far ahead as barriers
// allow. Blocks follow the same order; warp priorities order them at random.
enum class Schedule { fifo, reverse, random, warp_priority };

void set_schedule(Schedule kind, uint64_t seed);
cudaError_t run(const cudaLaunchConfig_t& config, const Call& call);

}  // namespace cuda_host
