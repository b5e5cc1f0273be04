// The short vectors of CUDA: only their size and alignment matter, for 8- and 16-byte loads.
#pragma once

#define SPARSEKERN_VECTOR_2(Name, T)   \
  struct alignas(2 * sizeof(T)) Name { \
    T x, y;                            \
  };                                   \
  inline Name make_##Name(T x, T y) { return {x, y}; }

#define SPARSEKERN_VECTOR_4(Name, T)   \
  struct alignas(4 * sizeof(T)) Name { \
    T x, y, z, w;                      \
  };                                   \
  inline Name make_##Name(T x, T y, T z, T w) { return {x, y, z, w}; }

SPARSEKERN_VECTOR_2(float2, float)
SPARSEKERN_VECTOR_2(int2, int)
SPARSEKERN_VECTOR_2(uint2, unsigned)
SPARSEKERN_VECTOR_2(longlong2, long long)
SPARSEKERN_VECTOR_2(ulonglong2, unsigned long long)
SPARSEKERN_VECTOR_4(float4, float)
SPARSEKERN_VECTOR_4(int4, int)
SPARSEKERN_VECTOR_4(uint4, unsigned)

#undef SPARSEKERN_VECTOR_2
#undef SPARSEKERN_VECTOR_4
