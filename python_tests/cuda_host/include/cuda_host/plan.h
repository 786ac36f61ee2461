// How a launch divides the work, as tests see it.
#pragma once

#include <cstdint>

struct Plan {
  int64_t grid, block, shared_bytes;
  int64_t covered;  // what all blocks take in one turn, times their turns
};
