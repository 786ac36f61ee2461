// Device side: thread position, barriers, warp collectives, atomics and intrinsics
#pragma once

#include <algorithm>
#include <type_traits>

// Not const, unlike CUDA's: the emulator changes them when it switches threads.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
extern const int warpSize;

namespace cuda_host {

// Place of a call in a kernel
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && !strcmp(file, other.file); }
};

enum class Collective { syncwarp, shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot, any, all };

unsigned char* dynamic_shared();
void sync_threads(Site site);
void fence(bool whole_device);
// One thread's part in a collective of the lanes in mask. Returns the bits that another lane passed, a mask of lanes,
// or ~0 (poison) if the requested lane does not participate.
uint64_t meet(Collective operation, unsigned mask, uint64_t value, int lane, int width, Site site);

template <class T>
T shuffle(Collective operation, unsigned mask, T value, int lane, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles numbers of 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = meet(operation, mask, bits, lane, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class To, class From>
To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace cuda_host

// Last parameter of every function that can wait; a default argument is evaluated at the call site.
#define CUDA_HOST_SITE ::cuda_host::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::sync_threads(site); }
inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_HOST_SITE) {
  cuda_host::meet(cuda_host::Collective::syncwarp, mask, 0, 0, 32, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle, mask, value, lane, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle_xor, mask, value, lane_mask, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle_up, mask, value, int(delta), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle_down, mask, value, int(delta), width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return unsigned(cuda_host::meet(cuda_host::Collective::ballot, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return int(cuda_host::meet(cuda_host::Collective::any, mask, predicate != 0, 0, 32, site));
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return int(cuda_host::meet(cuda_host::Collective::all, mask, predicate != 0, 0, 32, site));
}
#undef CUDA_HOST_SITE

inline void __threadfence() { cuda_host::fence(true); }
inline void __threadfence_block() { cuda_host::fence(false); }
int atomicAdd(int* address, int value);
unsigned int atomicAdd(unsigned int* address, unsigned int value);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value);
unsigned int atomicInc(unsigned int* address, unsigned int limit);

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __float_as_int(float x) { return cuda_host::reinterpret<int>(x); }
inline unsigned int __float_as_uint(float x) { return cuda_host::reinterpret<unsigned int>(x); }
inline float __int_as_float(int x) { return cuda_host::reinterpret<float>(x); }
inline float __uint_as_float(unsigned int x) { return cuda_host::reinterpret<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_host::reinterpret<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_host::reinterpret<double>(x); }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
// Unlike on a device, the compiler may fuse a product and a sum (-ffp-contract=fast).
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
