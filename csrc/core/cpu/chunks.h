// How work is divided among threads: by size alone, so that results do not depend on the number of threads. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kdkernels::cpu {

struct Chunks {
  int64_t items;
  int64_t size;  // items in a chunk; the last one may have fewer

  // About `chunk_cost` operations per chunk: enough to hide the cost of handing it to a thread.
  Chunks(int64_t items, int64_t cost_of_item, int64_t chunk_cost = 32768)
      : items(items), size(std::max<int64_t>(1, chunk_cost / std::max<int64_t>(1, cost_of_item))) {}

  int64_t count() const { return (items + size - 1) / size; }
};

}  // namespace kdkernels::cpu
