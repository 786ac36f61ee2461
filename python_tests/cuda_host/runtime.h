// State of the running launch, shared by the scheduler, the collectives and the race detector
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "fiber.h"

namespace cuda_host {

inline constexpr int warp_size = 32;
inline constexpr int max_threads = 1024;

enum class State { fresh, ready, at_barrier, at_collective, gone };

struct Thread {
  uint3 index;
  State state;
  Fiber* fiber;
  // The call at which it waits
  Site site;
  Collective operation;
  unsigned mask;
  uint64_t value;  // passed in; the result afterwards
  int lane, width;
};

struct Warp {
  unsigned gone;  // lanes that left the kernel or never existed
  unsigned waiting;
};

// Memory that a kernel may access
struct Region {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool writable = true;
  void* shadow = nullptr;  // for the race detector
  size_t shadow_bytes = 0;

  bool holds(uintptr_t address, size_t size) const {
    return address >= begin && address - begin <= bytes && size <= bytes - (address - begin);
  }
};

struct Launch {
  cudaLaunchConfig_t config;
  Call call;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int running = -1;  // index of the thread; -1 outside a kernel
  int at_barrier;
  int gone;
  unsigned long long block;  // linear index
  std::string error;
};
extern Launch launched;

// Observes a launch in the race build
class Observer {
 public:
  virtual void forget_tensors() = 0;
  virtual void begin_launch() = 0;
  virtual void begin_block() = 0;
  virtual void barrier() = 0;
  virtual void warp_barrier(int warp, unsigned lanes) = 0;
  virtual void fence(bool whole_device) = 0;
  virtual void atomic(void* address, size_t bytes, void* code) = 0;
};
extern Observer* observer;

extern std::vector<Region> tensors;
extern bool memory_is_open;  // whether kernels may access memory beyond the tensors
Region* open_mapping(uintptr_t address);
extern Region static_shared;
extern Region dynamic_region;
extern Region library;  // code and data of the kernel library

void make_ready(int thread);
// Ends the launch with this error; called from a kernel thread.
[[noreturn]] void fail(const std::string& text);
void leave_kernel();
// Describes a deadlock; called by the scheduler when threads are left but none can run.
std::string deadlock();

std::string describe(const uint3& index);
std::string describe(Site site);
std::string describe_code(const void* address);
// For example "8 bytes past the end of tensor x"
std::string describe_data(uintptr_t address);
std::string kernel_name();

}  // namespace cuda_host
