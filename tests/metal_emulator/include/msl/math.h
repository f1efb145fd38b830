// Math functions of MSL. There is one overload per scalar type and no other, so that a call with
// mixed types, like max(half, float), is ambiguous here as it is on Metal.
#pragma once
#include "vectors.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define M_PI_F 3.14159265358979f
#define M_E_F 2.71828182845905f
#define M_LOG2E_F 1.44269504088896f
#define M_LN2_F 0.693147180559945f
#define M_SQRT2_F 1.41421356237310f

namespace metal {

#define UNARY(name, expression)                     \
  inline float name(float x) { return expression; } \
  inline half name(half h) {                        \
    float x = float(h);                             \
    return half(expression);                        \
  }                                                 \
  inline bfloat name(bfloat h) {                    \
    float x = float(h);                             \
    return bfloat(expression);                      \
  }                                                 \
  template <class T, int N>                         \
  inline vec<T, N> name(vec<T, N> a) {              \
    for (int i = 0; i < N; i++) a[i] = name(a[i]);  \
    return a;                                       \
  }
#define BINARY(name, expression)                             \
  inline float name(float x, float y) { return expression; } \
  inline half name(half g, half h) {                         \
    float x = float(g), y = float(h);                        \
    return half(expression);                                 \
  }                                                          \
  inline bfloat name(bfloat g, bfloat h) {                   \
    float x = float(g), y = float(h);                        \
    return bfloat(expression);                               \
  }                                                          \
  template <class T, int N>                                  \
  inline vec<T, N> name(vec<T, N> a, vec<T, N> b) {          \
    for (int i = 0; i < N; i++) a[i] = name(a[i], b[i]);     \
    return a;                                                \
  }
#define TERNARY(name, expression)                                     \
  inline float name(float x, float y, float z) { return expression; } \
  inline half name(half f, half g, half h) {                          \
    float x = float(f), y = float(g), z = float(h);                   \
    return half(expression);                                          \
  }                                                                   \
  inline bfloat name(bfloat f, bfloat g, bfloat h) {                  \
    float x = float(f), y = float(g), z = float(h);                   \
    return bfloat(expression);                                        \
  }                                                                   \
  template <class T, int N>                                           \
  inline vec<T, N> name(vec<T, N> a, vec<T, N> b, vec<T, N> c) {      \
    for (int i = 0; i < N; i++) a[i] = name(a[i], b[i], c[i]);        \
    return a;                                                         \
  }

// metal::fast and metal::precise exist for these; here all three compute the same.
#define TRANSCENDENTAL                    \
  UNARY(exp, __builtin_expf(x))           \
  UNARY(exp2, __builtin_exp2f(x))         \
  UNARY(exp10, __builtin_powf(10.0f, x))  \
  UNARY(log, __builtin_logf(x))           \
  UNARY(log2, __builtin_log2f(x))         \
  UNARY(log10, __builtin_log10f(x))       \
  UNARY(sin, __builtin_sinf(x))           \
  UNARY(cos, __builtin_cosf(x))           \
  UNARY(tan, __builtin_tanf(x))           \
  UNARY(asin, __builtin_asinf(x))         \
  UNARY(acos, __builtin_acosf(x))         \
  UNARY(atan, __builtin_atanf(x))         \
  UNARY(sinh, __builtin_sinhf(x))         \
  UNARY(cosh, __builtin_coshf(x))         \
  UNARY(tanh, __builtin_tanhf(x))         \
  UNARY(sqrt, __builtin_sqrtf(x))         \
  UNARY(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  BINARY(pow, __builtin_powf(x, y))       \
  BINARY(powr, __builtin_powf(x, y))      \
  BINARY(atan2, __builtin_atan2f(x, y))   \
  BINARY(fmod, __builtin_fmodf(x, y))     \
  BINARY(divide, x / y)
TRANSCENDENTAL
namespace fast {
TRANSCENDENTAL
}
namespace precise {
TRANSCENDENTAL
}

UNARY(floor, __builtin_floorf(x))
UNARY(ceil, __builtin_ceilf(x))
UNARY(round, __builtin_roundf(x))
UNARY(rint, __builtin_nearbyintf(x))
UNARY(trunc, __builtin_truncf(x))
UNARY(fract, x - __builtin_floorf(x))
UNARY(fabs, __builtin_fabsf(x))
UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)
BINARY(fmin, __builtin_fminf(x, y))
BINARY(fmax, __builtin_fmaxf(x, y))
BINARY(copysign, __builtin_copysignf(x, y))
BINARY(step, y < x ? 0.0f : 1.0f)
TERNARY(fma, __builtin_fmaf(x, y, z))
TERNARY(mix, x + (y - x) * z)

#define COMPARE(T, less_of, more_of)                                    \
  inline T min(T a, T b) { return less_of; }                            \
  inline T max(T a, T b) { return more_of; }                            \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  inline T select(T a, T b, bool use_b) { return use_b ? b : a; }
#define COMPARE_FLOAT(T)             \
  COMPARE(T, fmin(a, b), fmax(a, b)) \
  inline T abs(T a) { return fabs(a); }
#define COMPARE_INTEGER(T) COMPARE(T, b < a ? b : a, a < b ? b : a)
COMPARE_FLOAT(float)
COMPARE_FLOAT(half)
COMPARE_FLOAT(bfloat)
COMPARE_INTEGER(char)
COMPARE_INTEGER(short)
COMPARE_INTEGER(int)
COMPARE_INTEGER(long)
COMPARE_INTEGER(signed char)
COMPARE_INTEGER(uchar)
COMPARE_INTEGER(ushort)
COMPARE_INTEGER(uint)
COMPARE_INTEGER(ulong)
#undef COMPARE
#undef COMPARE_FLOAT
#undef COMPARE_INTEGER
#undef UNARY
#undef BINARY
#undef TERNARY
#undef TRANSCENDENTAL
inline int abs(int a) { return a < 0 ? -a : a; }
inline long abs(long a) { return a < 0 ? -a : a; }
inline short abs(short a) { return a < 0 ? -a : a; }

template <class T, int N>
inline vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = min(a[i], b[i]);
  return a;
}
template <class T, int N>
inline vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]);
  return a;
}
template <class T, int N>
inline vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = abs(a[i]);
  return a;
}
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return clamp(x, vec<T, N>(low), vec<T, N>(high));
}
template <class T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> use_b) {
  for (int i = 0; i < N; i++) a[i] = use_b[i] ? b[i] : a[i];
  return a;
}
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}
template <class T, int N>
inline T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
inline T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <int N>
inline bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= a[i];
  return r;
}
template <int N>
inline bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= a[i];
  return r;
}

inline bool isnan(float x) { return x != x; }
inline bool isnan(half x) { return x != x; }
inline bool isnan(bfloat x) { return (x.bits & 0x7fff) > 0x7f80; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(half x) { return __builtin_isinf(float(x)); }
inline bool isinf(bfloat x) { return (x.bits & 0x7fff) == 0x7f80; }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(half x) { return __builtin_isfinite(float(x)); }
inline bool isfinite(bfloat x) { return __builtin_isfinite(float(x)); }

inline float sincos(float x, float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }

inline uint popcount(uint x) { return __builtin_popcount(x); }
inline int popcount(int x) { return __builtin_popcount(x); }
inline ulong popcount(ulong x) { return __builtin_popcountl(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline int clz(int x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits ? (x >> offset) & (~0u >> (32 - bits)) : 0;
}
inline uint insert_bits(uint base, uint insert, uint offset, uint bits) {
  if (!bits) return base;
  uint mask = (~0u >> (32 - bits)) << offset;
  return (base & ~mask) | ((insert << offset) & mask);
}
}  // namespace metal
