// IEEE half precision as a storage type without arithmetic
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __half {
  unsigned short bits;
};
struct __align__(4) __half2 {
  __half x, y;
};
typedef __half half;
typedef __half2 half2;

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | magnitude << 13);
  // Read with a float's exponent bias, the value is 2^112 times too small, subnormal or not.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even
inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
  const unsigned short sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};  // 65520, halfway to 2^16
  if (magnitude < 0x38800000) {
    // Subnormal: the unit of floats in [1/2, 1) is 2^-24, and the sum is rounded to it.
    return {static_cast<unsigned short>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
  return {static_cast<unsigned short>(sign | rounded >> 13)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
