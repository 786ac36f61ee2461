// CUDA's host functions, and the hooks for Python
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>

#include "scheduler.h"

namespace {

struct Counters {
  unsigned long long launches;
  unsigned long long dynamic_shared_bytes;  // of the last launch, like the shapes below
  unsigned int grid[3];
  unsigned int block[3];
};

constexpr size_t unraised_shared_bytes = 48 << 10;
constexpr int usual_max_shared_bytes = 232448;  // of sm_90

Counters counters;
cudaError_t last_error = cudaSuccess;
std::string last_text;
int max_shared_bytes = usual_max_shared_bytes;
std::map<const void*, size_t> raised_shared_bytes;

cudaError_t remember(cudaError_t error, const std::string& text = "") {
  if (error != cudaSuccess) {
    last_error = error;
    last_text = text;
  }
  return error;
}

std::string refused(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return "a dimension is zero";
  if (block.z > 64) return "a block has more than 64 threads in z";
  if (block.x > 1024 || block.y > 1024 || block.x * block.y * block.z > 1024)
    return "a block has more than 1024 threads";
  if (grid.x > 0x7fffffff) return "a grid has more than 2^31 - 1 blocks in x";
  if (grid.y > 65535 || grid.z > 65535) return "a grid has more than 65535 blocks in y or z";
  const auto raised = raised_shared_bytes.find(kernel);
  const size_t limit = raised == raised_shared_bytes.end() ? unraised_shared_bytes : raised->second;
  if (config.dynamicSmemBytes > limit) {
    return std::to_string(config.dynamicSmemBytes) + " bytes of dynamic shared memory, but " + std::to_string(limit) +
           " are allowed";
  }
  return "";
}

}  // namespace

cudaError_t cuda_host::launch(const cudaLaunchConfig_t& config, const Call& call) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::string reason = refused(config, call.kernel);
  if (!reason.empty()) {
    launched.call = call;
    return remember(reason.find("shared") == std::string::npos ? cudaErrorInvalidConfiguration : cudaErrorInvalidValue,
                    "kernel " + kernel_name() + " cannot be launched: " + reason + "; grid " + describe(uint3(grid)) +
                        ", block " + describe(uint3(block)));
  }
  counters = {counters.launches + 1, config.dynamicSmemBytes, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
  const cudaError_t error = run(config, call);
  if (error == cudaSuccess) return error;
  return remember(error, "kernel " + kernel_name() + ", block " + describe(blockIdx) + ": " + launched.error);
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  // The text of the last launch says more than the name of its error.
  if (error != cudaSuccess && error == last_error && !last_text.empty()) return last_text.c_str();
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unknown error";
  }
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  static const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
  };
  if (device != 0) return remember(cudaErrorInvalidValue, "the only device is 0");
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = max_shared_bytes;
    return cudaSuccess;
  }
  const auto found = values.find(attribute);
  if (found == values.end())
    return remember(cudaErrorInvalidValue, "the emulator does not support this device attribute");
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > max_shared_bytes) {
    return remember(cudaErrorInvalidValue, std::to_string(value) + " bytes of dynamic shared memory, but the device " +
                                               "has " + std::to_string(max_shared_bytes));
  }
  raised_shared_bytes[kernel] = size_t(value);
  return cudaSuccess;
}

namespace cuda_host {

bool memory_is_open = false;

// Returns the process's writable mapping that contains an address.
Region* open_mapping(uintptr_t address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long begin = 0, end = 0;
    char access[5] = {};
    if (sscanf(line.c_str(), "%llx-%llx %4s", &begin, &end, access) != 3) continue;
    if (access[1] != 'w' || address < begin || address >= end) continue;
    const auto overlaps = [&](const Region& known) { return known.begin < end && begin < known.begin + known.bytes; };
    for (Region& known : tensors) {
      if (overlaps(known) && known.shadow) munmap(known.shadow, known.shadow_bytes);
    }
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), overlaps), tensors.end());
    Region mapping;
    mapping.name = "the host's memory";
    mapping.begin = begin;
    mapping.bytes = end - begin;
    tensors.push_back(mapping);
    return &tensors.back();
  }
  return nullptr;
}

}  // namespace cuda_host

extern "C" {

void cuda_host_set_schedule(int kind, uint64_t seed) {
  cuda_host::set_schedule(static_cast<cuda_host::Schedule>(kind), seed);
}
const char* cuda_host_last_error_text() { return last_text.c_str(); }
const char* cuda_host_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
Counters cuda_host_counters() { return counters; }

// 0 restores the usual limit; limits raised for kernels are reset.
void cuda_host_set_max_shared(int bytes) {
  max_shared_bytes = bytes ? bytes : usual_max_shared_bytes;
  raised_shared_bytes.clear();
}

// Kernels called through torch may access the whole process: the emulator does not know torch's allocations.
void cuda_host_open_memory(int open) { cuda_host::memory_is_open = open != 0; }

void cuda_host_register_tensor(const void* address, size_t bytes, int writable, const char* name) {
  cuda_host::Region tensor;
  tensor.name = std::string("tensor ") + name;
  tensor.begin = uintptr_t(address);
  tensor.bytes = bytes;
  tensor.writable = writable != 0;
  cuda_host::tensors.push_back(tensor);
}
void cuda_host_clear_tensors() {
  if (cuda_host::observer) cuda_host::observer->forget_tensors();
  cuda_host::tensors.clear();
}
}
