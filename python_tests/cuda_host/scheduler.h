// The scheduler, as the host's functions see it
#pragma once

#include "runtime.h"

namespace cuda_host {

// In the order of the index; in the opposite one; at random; and by random priorities of warps, where one warp runs as
// far ahead as barriers let it. Blocks are ordered likewise.
enum class Schedule { fifo, reverse, random, warp_priority };

void set_schedule(Schedule kind, uint64_t seed);
cudaError_t run(const cudaLaunchConfig_t& config, const Call& call);

}  // namespace cuda_host
