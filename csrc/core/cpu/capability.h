// Chooses among the compiled instruction sets the one that this machine runs, and its kernels.
#pragma once

#if defined(KDKERNELS_CAPABILITY)
// Where the kernels themselves are compiled there is nothing to choose: KDKERNELS_KERNEL only declares.
#define KDKERNELS_KERNEL(result, name, parameters, arguments) \
  namespace KDKERNELS_CAPABILITY {                            \
  result name parameters;                                     \
  }
#else

#include <cstdlib>
#include <cstring>

#if defined(__GNUC__) && defined(__x86_64__)
#define KDKERNELS_X86 1
#else
#define KDKERNELS_X86 0
#endif

namespace kdkernels::cpu {

enum class Capability { baseline, avx2, avx512 };

// The best one available, or the lesser one that the environment variable KDKERNELS_CPU_CAPABILITY names
inline Capability capability() {
  static const Capability chosen = [] {
    Capability best = Capability::baseline;
#if KDKERNELS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      best = Capability::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        best = Capability::avx512;
      }
    }
#endif
    const char* name = std::getenv("KDKERNELS_CPU_CAPABILITY");
    if (name != nullptr && std::strcmp(name, "baseline") == 0) {
      best = Capability::baseline;
    } else if (name != nullptr && std::strcmp(name, "avx2") == 0 && best == Capability::avx512) {
      best = Capability::avx2;
    }
    return best;
  }();
  return chosen;
}

inline const char* capability_name() {
  switch (capability()) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The compilation of a kernel that this machine runs
template <class Kernel>
Kernel choose(Kernel avx512, Kernel avx2, Kernel baseline) {
  switch (capability()) {
    case Capability::avx512:
      return avx512;
    case Capability::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace kdkernels::cpu

// Declares a kernel in the namespace of each compilation, and a function of the same name that calls the best one.
#if KDKERNELS_X86
#define KDKERNELS_KERNEL(result, name, parameters, arguments)                     \
  namespace avx512 {                                                              \
  result name parameters;                                                         \
  }                                                                               \
  namespace avx2 {                                                                \
  result name parameters;                                                         \
  }                                                                               \
  namespace baseline {                                                            \
  result name parameters;                                                         \
  }                                                                               \
  inline result name parameters {                                                 \
    static const auto best = choose(&avx512::name, &avx2::name, &baseline::name); \
    return best arguments;                                                        \
  }
#else
#define KDKERNELS_KERNEL(result, name, parameters, arguments) \
  namespace baseline {                                        \
  result name parameters;                                     \
  }                                                           \
  inline result name parameters { return baseline::name arguments; }
#endif

#endif
