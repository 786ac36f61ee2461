// Work on several threads: each chunk leaves its own partial result, and the partial results are combined in order.
#pragma once

#include <vector>

#include "core/cpu/chunks.h"
#include "core/stable.h"

namespace kdkernels::cpu {

// Calls body(chunk, begin, end) for every chunk. It must not throw: an exception would lose its text in a thread.
template <class Body>
void for_each_chunk(const Chunks& chunks, const Body& body) {
  torch::stable::parallel_for(0, chunks.count(), 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk * chunks.size, std::min(chunks.items, (chunk + 1) * chunks.size));
    }
  });
}

// Calls kernel(call, begin, end) for every chunk of a call's work.
template <class Call>
void run_kernel(void (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  for_each_chunk(call.chunks(), [&](int64_t, int64_t begin, int64_t end) { kernel(call, begin, end); });
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
