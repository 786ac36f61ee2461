// From torch's tensors to CUDA kernels: the device, its stream, and scalars that may lie on the host or on the device.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/vec.cuh"
#include "core/dispatch.h"

// The dispatch key that the bindings register for, and which scalars are left to the kernels to read. Tests that run
// the kernels on the host define both differently.
#if !defined(KDKERNELS_DISPATCH_KEY)
#define KDKERNELS_DISPATCH_KEY CUDA
#endif
#if !defined(KDKERNELS_SCALARS_ON_DEVICE)
#define KDKERNELS_SCALARS_ON_DEVICE scalar.is_cuda()
#endif
#define KDKERNELS_REGISTER_FOR(key, m) STABLE_TORCH_LIBRARY_IMPL(kdkernels, key, m)
#define KDKERNELS_REGISTER(m) KDKERNELS_REGISTER_FOR(KDKERNELS_DISPATCH_KEY, m)

namespace kdkernels::cuda {

// Makes a tensor's device the current one for as long as this object lives; its stream is the one that torch works on.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  int64_t most_shared_bytes() const {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess,
                    "kdkernels: a CUDA kernel could not be launched: ", cudaGetErrorString(error));
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Memory for the partial results of one call: two streams may run an op at once.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, std::array<int64_t, 1>{bytes}, ScalarType::Byte);
}

inline ScalarArgument scalar_argument(const Tensor& scalar) {
  if (KDKERNELS_SCALARS_ON_DEVICE) return {scalar.const_data_ptr(), storage_of(scalar), 0};
  return {nullptr, Storage::float64, read_scalar(scalar)};
}

// The value of a scalar argument, or `otherwise` where only the device knows it
inline double known_value(const ScalarArgument& scalar, double otherwise) {
  return scalar.device == nullptr ? scalar.value : otherwise;
}

}  // namespace kdkernels::cuda
