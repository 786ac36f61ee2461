// What the cases of the instruction counter share. Every <op>/counted.h has the cases of its op, which call the AVX2
// compilation of the kernels on one thread; bench/instructions/driver.cpp runs and counts them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"

namespace kdkernels::counted {

using cpu::Chunks;

// Runs a case twice and counts the second time. magnitude() tells afterwards whether the kernel has computed anything.
void run_case(const std::string& name, int64_t elements, const std::function<void()>& body,
              const std::function<double()>& magnitude);

// The functions that run the cases of each op, in the order of the files
inline std::vector<void (*)()>& all_cases() {
  static std::vector<void (*)()> cases;
  return cases;
}
struct Cases {
  explicit Cases(void (*run)()) { all_cases().push_back(run); }
};

// Calls kernel(begin, end) for every chunk, as the bindings do.
template <class Kernel>
void for_each_chunk(const Chunks& chunks, const Kernel& kernel) {
  for (int64_t begin = 0; begin < chunks.items; begin += chunks.size) {
    kernel(begin, std::min(chunks.items, begin + chunks.size));
  }
}
template <class Call>
void run_kernel(void (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  for_each_chunk(call.chunks(), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

inline const char* name_of(Storage storage) {
  return storage == Storage::float32 ? "fp32" : storage == Storage::bfloat16 ? "bf16" : "fp16";
}

// A tensor's memory: NaN until something is written, or numbers between -3 and 3 that are the same in every run.
class Numbers {
 public:
  Numbers(Storage storage, int64_t count)
      : storage_(storage), count_(count), words_(size_t(count * size_of(storage) + 7) / 8, ~uint64_t(0)) {}
  Numbers(Storage storage, int64_t count, uint32_t seed) : Numbers(storage, count) {
    cpu::with_storage(storage_, [&](auto type) {
      uint32_t state = seed;
      for (int64_t i = 0; i < count_; ++i) {
        state = state * 1664525u + 1013904223u;
        cpu::store<float>(static_cast<decltype(type)*>(data()) + i, float(state >> 8) * 0x1p-24f * 6 - 3);
      }
    });
  }

  void* data() { return words_.data(); }

  // The sum of the absolute values: NaN where a number was not written
  double magnitude() {
    double sum = 0;
    cpu::with_storage(storage_, [&](auto type) {
      for (int64_t i = 0; i < count_; ++i) {
        sum += std::abs(double(cpu::load<float>(static_cast<const decltype(type)*>(data()) + i)));
      }
    });
    return sum;
  }

 private:
  Storage storage_;
  int64_t count_;
  std::vector<uint64_t> words_;
};

}  // namespace kdkernels::counted
