// The Python module kdkernels._cuda, which tells what GPUs it was built for. Importing it registers the CUDA kernels
// with torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/stable.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  // Separated by spaces: sm_90 is machine code, compute_90 code that the driver compiles for later GPUs.
  info["architectures"] = pybind11::str(KDKERNELS_CUDA_ARCHITECTURES).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA half of kdkernels: registers the CUDA kernels with torch.";
  m.def("build_info", &build_info, "torch ABI target, CUDA version, and the architectures that were compiled for.");
}
