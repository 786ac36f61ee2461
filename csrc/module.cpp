// The Python module kdkernels._C: what was built, and the building blocks of formulas for unit tests. Ops do not pass
// through here; importing the module registers them with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/cpu/unit.h"
#include "core/stable.h"

namespace py = pybind11;
namespace kdkernels {
namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "GCC " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  info["cpu_capability"] = cpu::capability_name();
  return info;
}

// A function of core/fast_exp.h, number by number (as in a CUDA thread) or in the lanes of vectors
template <class S>
std::vector<S> evaluate(const std::string& name, std::vector<S> values, bool vectors) {
  if (vectors) {
    constexpr bool is_double = std::is_same_v<S, double>;
    cpu::evaluate_vectors(name.c_str(), values.data(), int64_t(values.size()), is_double);
  } else {
    for (S& value : values) value = cpu::apply_function(name.c_str(), value);
  }
  return values;
}

// Stores and loads numbers in 16 bits as kernels do.
std::vector<float> round_trip(std::vector<float> values, const std::string& dtype) {
  const Storage storage = dtype == "float16" ? Storage::float16 : Storage::bfloat16;
  cpu::round_trip(values.data(), int64_t(values.size()), storage);
  return values;
}

}  // namespace
}  // namespace kdkernels

PYBIND11_MODULE(_C, m) {
  using namespace kdkernels;
  m.doc() = "Compiled half of kdkernels: registers the CPU kernels with torch.";
  m.def("build_info", &build_info, "Compiler, torch ABI target and the instruction set chosen on this machine.");
  m.def("evaluate_float", &evaluate<float>, py::arg("name"), py::arg("values"), py::arg("vectors"));
  m.def("evaluate_double", &evaluate<double>, py::arg("name"), py::arg("values"), py::arg("vectors"));
  m.def("round_trip", &round_trip, py::arg("values"), py::arg("dtype"));
}
