// Functions that the CUDA bindings need and that a CPU build of torch lacks. Linked with the bindings, these
// definitions are found first: CPU tensors are on the only device, whose stream is the null stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t /*device_index*/, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle /*guard*/) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t /*device_index*/, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}
