// Working memory of a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Uninitialized numbers, aligned for every vector
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(::operator new(size_t(size) * sizeof(S), std::align_val_t(64))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  S* get() const { return static_cast<S*>(memory_); }

 private:
  void* memory_;
};

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
