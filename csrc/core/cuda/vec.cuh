// Loads and stores that convert between the stored and the computed type, 16 bytes at a time where memory is aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "core/cuda/launch.cuh"
#include "core/storage.h"

namespace kdkernels::cuda {

template <class S, class T>
__device__ __forceinline__ S to_compute(T stored) {
  if constexpr (sizeof(T) >= 4) {
    return S(stored);
  } else if constexpr (std::is_same_v<T, __half>) {
    return S(__half2float(stored));
  } else {
    return S(__bfloat162float(stored));
  }
}

template <class T, class S>
__device__ __forceinline__ T to_stored(S value) {
  if constexpr (sizeof(T) >= 4) {
    return T(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(float(value));
  } else {
    return __float2bfloat16_rn(float(value));
  }
}

// Calls body(Type<T>()) with the type that numbers are stored as. All threads have the same storage: the branch costs
// next to nothing compared to the memory access that follows it.
template <class Body>
__device__ __forceinline__ decltype(auto) with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::float64:
      return body(Type<double>());
    case Storage::float16:
      return body(Type<__half>());
    case Storage::bfloat16:
      return body(Type<__nv_bfloat16>());
    default:
      return body(Type<float>());
  }
}

// `count` neighbouring numbers, aligned to their size or to 16 bytes, whichever is less
template <int count, class T>
struct Pack {
  static constexpr int bytes = count * int(sizeof(T));
  using Word = std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes % 8 == 0, uint2, unsigned>>;
  static constexpr int words = bytes / int(sizeof(Word));
  static_assert(bytes % int(sizeof(Word)) == 0, "a pack is made of whole words");

  T values[count];

  __device__ __forceinline__ static Pack load(const T* source) {
    Word raw[words];
#pragma unroll
    for (int w = 0; w < words; ++w) raw[w] = reinterpret_cast<const Word*>(source)[w];
    Pack pack;
    memcpy(pack.values, raw, bytes);
    return pack;
  }
  __device__ __forceinline__ void store(T* destination) const {
    Word raw[words];
    memcpy(raw, values, bytes);
#pragma unroll
    for (int w = 0; w < words; ++w) reinterpret_cast<Word*>(destination)[w] = raw[w];
  }
  __host__ __device__ __forceinline__ static bool aligned(const void* data) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Word) == 0;
  }
};

// How many numbers fit into 16 bytes
template <class T>
constexpr int pack_of = 16 / int(sizeof(T));

// Load and store a pack of which only the first `valid` numbers exist; the others are loaded as 0.
template <class T, class S, int pack>
__device__ __forceinline__ void load_some(const T* source, int64_t valid, S (&values)[pack]) {
  if (valid >= pack && Pack<pack, T>::aligned(source)) {
    const auto stored = Pack<pack, T>::load(source);
#pragma unroll
    for (int k = 0; k < pack; ++k) values[k] = to_compute<S>(stored.values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < pack; ++k) values[k] = k < valid ? to_compute<S>(source[k]) : S(0);
  }
}
template <class T, class S, int pack>
__device__ __forceinline__ void store_some(T* destination, int64_t valid, const S (&values)[pack]) {
  if (valid >= pack && Pack<pack, T>::aligned(destination)) {
    Pack<pack, T> stored;
#pragma unroll
    for (int k = 0; k < pack; ++k) stored.values[k] = to_stored<T>(values[k]);
    stored.store(destination);
  } else {
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      if (k < valid) destination[k] = to_stored<T>(values[k]);
    }
  }
}

// A run: neighbouring numbers of a tensor, taken in packs of 16 bytes. The first pack begins where memory is aligned,
// `shift` numbers before the first number; what packs contain before the first and after the last number is not
// touched.
template <class T>
struct Run {
  static constexpr int pack = pack_of<T>;
  T* data;
  int64_t count;
  int shift;
  bool aligned;

  __device__ __forceinline__ Run(T* data, int64_t count)
      : data(data), count(count), shift(int(reinterpret_cast<uintptr_t>(data) / sizeof(T) % pack)), aligned(true) {}
  // A run that is taken in the same packs as another
  template <class U>
  __device__ __forceinline__ Run(T* data, const Run<U>& like)
      : data(data),
        count(like.count),
        shift(like.shift),
        aligned(int(reinterpret_cast<uintptr_t>(data) / sizeof(T) % pack) == like.shift) {}

  __device__ __forceinline__ int64_t packs() const { return (count + shift + pack - 1) / pack; }
  __device__ __forceinline__ int64_t first_of(int64_t p) const { return p * pack - shift; }
  __device__ __forceinline__ bool has(int64_t i) const { return i >= 0 && i < count; }
  __device__ __forceinline__ bool whole(int64_t p) const { return first_of(p) >= 0 && first_of(p) + pack <= count; }

  // Loads and stores the numbers of pack p; those outside the run are loaded as 0.
  template <class S>
  __device__ __forceinline__ void load(int64_t p, S (&numbers)[pack]) const {
    const int64_t first = first_of(p);
    if (aligned && whole(p)) {
      const auto stored = Pack<pack, std::remove_const_t<T>>::load(data + first);
#pragma unroll
      for (int k = 0; k < pack; ++k) numbers[k] = to_compute<S>(stored.values[k]);
    } else {
#pragma unroll
      for (int k = 0; k < pack; ++k) numbers[k] = has(first + k) ? to_compute<S>(data[first + k]) : S(0);
    }
  }
  template <class S>
  __device__ __forceinline__ void store(int64_t p, const S (&numbers)[pack]) const {
    const int64_t first = first_of(p);
    if (aligned && whole(p)) {
      Pack<pack, T> stored;
#pragma unroll
      for (int k = 0; k < pack; ++k) stored.values[k] = to_stored<T>(numbers[k]);
      stored.store(data + first);
    } else {
#pragma unroll
      for (int k = 0; k < pack; ++k) {
        if (has(first + k)) data[first + k] = to_stored<T>(numbers[k]);
      }
    }
  }
};

// Calls body(Type<T>()) on the host with the type that numbers are stored as.
template <class Body>
cudaError_t for_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::float64:
      return body(Type<double>());
    case Storage::float16:
      return body(Type<__half>());
    case Storage::bfloat16:
      return body(Type<__nv_bfloat16>());
    default:
      return body(Type<float>());
  }
}

// The value of a 0-dim tensor: known on the host, or read from device memory by the kernel
struct ScalarArgument {
  const void* device = nullptr;
  Storage storage = Storage::float64;
  double value = 0;

  __device__ __forceinline__ double read() const {
    if (device == nullptr) return value;
    return with_storage(storage, [&](auto type) {
      using T = typename decltype(type)::type;
      return to_compute<double>(*static_cast<const T*>(device));
    });
  }
};

}  // namespace kdkernels::cuda
