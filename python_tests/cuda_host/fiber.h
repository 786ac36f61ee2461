// A fiber: its own stack and the place where it stopped. All fibers run on one CPU thread.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#define CUDA_HOST_PORTABLE_FIBER 1
#endif

namespace cuda_host {

inline constexpr size_t stack_bytes = 64 << 10;
inline constexpr size_t page_bytes = 4 << 10;

struct Fiber {
  unsigned char* stack;  // lowest byte, above a guard page
#if defined(CUDA_HOST_PORTABLE_FIBER)
  ucontext_t context;
#else
  void* stack_pointer;
#endif

  bool holds(uintptr_t address) const { return address - uintptr_t(stack) < stack_bytes; }
  bool guards(uintptr_t address) const { return address - (uintptr_t(stack) - page_bytes) < page_bytes; }
};

// Takes a fiber from a pool that only grows; it will run entry, which must not return.
Fiber* take_fiber(void (*entry)());
void return_fiber(Fiber* fiber);
// Switch from the scheduler to a fiber, and back
void resume(Fiber* fiber);
void suspend();

// Bytes that end at an inaccessible page
unsigned char* map_guarded(size_t bytes);
void unmap_guarded(unsigned char* memory, size_t bytes);

}  // namespace cuda_host
