// Work on several threads with results that do not depend on their number: chunks are cut by size alone, each
// leaves its own partial result, and the partial results are combined in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/stable.h"

namespace kdkernels::cpu {

struct Chunks {
  int64_t items;
  int64_t size;  // items in a chunk, the last one may have fewer

  // About `chunk_cost` operations a chunk: enough to hide the cost of handing it to a thread.
  Chunks(int64_t items, int64_t cost_of_item, int64_t chunk_cost = 32768)
      : items(items), size(std::max<int64_t>(1, chunk_cost / std::max<int64_t>(1, cost_of_item))) {}

  int64_t count() const { return (items + size - 1) / size; }
};

// body(chunk, begin, end) for every chunk. It must not throw: an exception would lose its text in a thread.
template <class Body>
void for_each_chunk(const Chunks& chunks, const Body& body) {
  torch::stable::parallel_for(0, chunks.count(), 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk * chunks.size, std::min(chunks.items, (chunk + 1) * chunks.size));
    }
  });
}

// The sum of body(begin, end) over all chunks, in their order
template <class Body>
double sum_over_chunks(const Chunks& chunks, const Body& body) {
  std::vector<double> partial(size_t(chunks.count()));
  for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t end) { partial[size_t(chunk)] = body(begin, end); });
  double total = 0;
  for (double value : partial) total += value;
  return total;
}

}  // namespace kdkernels::cpu
