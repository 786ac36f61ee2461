// Vector types with CUDA's alignment
#pragma once

#define CUDA_HOST_VECTOR_TYPES(scalar, name, align2, align4)                        \
  struct name##1 { scalar x; };                                                     \
  struct __align__(align2) name##2 { scalar x, y; };                                \
  struct name##3 { scalar x, y, z; };                                               \
  struct __align__(align4) name##4 { scalar x, y, z, w; };                          \
  inline name##1 make_##name##1(scalar x) { return {x}; }                           \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }              \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

CUDA_HOST_VECTOR_TYPES(signed char, char, 2, 4)
CUDA_HOST_VECTOR_TYPES(unsigned char, uchar, 2, 4)
CUDA_HOST_VECTOR_TYPES(short, short, 4, 8)
CUDA_HOST_VECTOR_TYPES(unsigned short, ushort, 4, 8)
CUDA_HOST_VECTOR_TYPES(int, int, 8, 16)
CUDA_HOST_VECTOR_TYPES(unsigned int, uint, 8, 16)
CUDA_HOST_VECTOR_TYPES(long long, longlong, 16, 16)
CUDA_HOST_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
CUDA_HOST_VECTOR_TYPES(float, float, 8, 16)
CUDA_HOST_VECTOR_TYPES(double, double, 16, 16)
#undef CUDA_HOST_VECTOR_TYPES

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
