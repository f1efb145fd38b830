// Vector types of MSL: swizzles, operators and packed forms.
#pragma once
#include "scalars.h"

namespace metal {
template <class T, int N>
struct vec;

// A swizzle lives in the union of its vector and copies components in and out.
struct swizzle_base {};
template <class T, int N, int... I>
struct swizzle : swizzle_base {
  T e[N];
  using vector = vec<T, sizeof...(I)>;
  operator vector() const { return vector{e[I]...}; }
  swizzle& operator=(const vector& v) {
    int k = 0;
    ((e[I] = v[k++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = vector(other); }
  template <class B>
  swizzle& operator+=(const B& b) {
    return *this = vector(vector(*this) + b);
  }
  template <class B>
  swizzle& operator-=(const B& b) {
    return *this = vector(vector(*this) - b);
  }
  template <class B>
  swizzle& operator*=(const B& b) {
    return *this = vector(vector(*this) * b);
  }
};

// sizeof and alignof a 3-vector are those of a 4-vector.
#define VEC_MEMBERS(N)                                         \
  using scalar = T;                                            \
  static constexpr int size = N;                               \
  T& operator[](int i) { return e[i]; }                        \
  const T& operator[](int i) const { return e[i]; }            \
  vec() = default;                                             \
  vec(const vec& o) { __builtin_memcpy(e, o.e, sizeof e); }    \
  vec& operator=(const vec& o) {                               \
    __builtin_memcpy(e, o.e, sizeof e);                        \
    return *this;                                              \
  }                                                            \
  template <class A, class = enable_if_t<is_arithmetic_v<A>>>  \
  vec(A s) {                                                   \
    for (int i = 0; i < N; i++) e[i] = T(s);                   \
  }                                                            \
  template <class U>                                           \
  explicit vec(const vec<U, N>& o) {                           \
    for (int i = 0; i < N; i++) e[i] = T(o[i]);                \
  }                                                            \
  template <class A, class B, class... C>                      \
  vec(A a, B b, C... c) {                                      \
    int k = 0;                                                 \
    append(k, a), append(k, b), (append(k, c), ...);           \
  }                                                            \
                                                               \
 private:                                                      \
  template <class A>                                           \
  void append(int& k, const A& a) {                            \
    if constexpr (is_arithmetic_v<A>) {                        \
      e[k++] = T(a);                                           \
    } else if constexpr (std::is_base_of_v<swizzle_base, A>) { \
      append(k, typename A::vector(a));                        \
    } else {                                                   \
      for (int i = 0; i < A::size; i++) e[k++] = T(a[i]);      \
    }                                                          \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T e[2];
    struct {
      T x, y;
    };
    swizzle<T, 2, 1, 0> yx;
  };
  VEC_MEMBERS(2)
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T e[3];
    struct {
      T x, y, z;
    };
    swizzle<T, 3, 0, 1> xy;
    swizzle<T, 3, 1, 2> yz;
    swizzle<T, 3, 0, 2> xz;
  };
  VEC_MEMBERS(3)
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T e[4];
    struct {
      T x, y, z, w;
    };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw;
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 1, 2, 3> yzw;
    swizzle<T, 4, 3, 2, 1, 0> wzyx;
    swizzle<T, 4, 1, 0, 3, 2> yxwz;
    swizzle<T, 4, 2, 3, 0, 1> zwxy;
  };
  VEC_MEMBERS(4)
};
#undef VEC_MEMBERS

template <class X, bool = std::is_base_of_v<swizzle_base, X>>
struct plain {
  using type = X;
};
template <class X>
struct plain<X, true> {
  using type = typename X::vector;
};
template <class X>
using plain_t = typename plain<X>::type;
template <class X>
struct is_vec : false_type {};
template <class T, int N>
struct is_vec<vec<T, N>> : true_type {};
template <class X>
constexpr bool is_vec_v = is_vec<plain_t<X>>::value;

// The vector type of "vector op scalar", "scalar op vector" or "vector op vector".
template <class A, class B>
struct operand {
  using type = conditional_t<is_vec_v<A>, plain_t<A>, plain_t<B>>;
  static_assert(!is_vec_v<A> || !is_vec_v<B> || is_same_v<plain_t<A>, plain_t<B>>,
                "MSL: vector operands differ in type");
  using other = conditional_t<is_vec_v<A>, B, A>;
  static_assert(!is_same_v<typename type::scalar, bfloat> || is_vec_v<other> ||
                    !is_floating_point_v<other> || is_same_v<other, bfloat>,
                "MSL: bfloat takes no implicit conversion from float or half");
};
#define VEC_OPERATOR(op, Result)                                               \
  template <class A, class B, class = enable_if_t<is_vec_v<A> || is_vec_v<B>>> \
  inline auto operator op(const A& left, const B& right) {                     \
    using V = typename operand<A, B>::type;                                    \
    using T = typename V::scalar;                                              \
    V a(static_cast<plain_t<A>>(left)), b(static_cast<plain_t<B>>(right));     \
    vec<Result, V::size> r;                                                    \
    for (int i = 0; i < V::size; i++) r[i] = Result(a[i] op b[i]);             \
    return r;                                                                  \
  }
#define VEC_ARITHMETIC(op)                                        \
  VEC_OPERATOR(op, T)                                             \
  template <class T, int N, class B>                              \
  inline vec<T, N>& operator op##=(vec<T, N>& a, const B& b) {   \
    return a = a op b;                                            \
  }
VEC_ARITHMETIC(+)
VEC_ARITHMETIC(-)
VEC_ARITHMETIC(*)
VEC_ARITHMETIC(/)
VEC_ARITHMETIC(%)
VEC_ARITHMETIC(&)
VEC_ARITHMETIC(|)
VEC_ARITHMETIC(^)
VEC_ARITHMETIC(<<)
VEC_ARITHMETIC(>>)
VEC_OPERATOR(==, bool)
VEC_OPERATOR(!=, bool)
VEC_OPERATOR(<, bool)
VEC_OPERATOR(>, bool)
VEC_OPERATOR(<=, bool)
VEC_OPERATOR(>=, bool)
VEC_OPERATOR(&&, bool)
VEC_OPERATOR(||, bool)
#undef VEC_ARITHMETIC
#undef VEC_OPERATOR
template <class A, class = enable_if_t<is_vec_v<A>>>
inline plain_t<A> operator-(const A& x) {
  plain_t<A> a = x;
  for (int i = 0; i < a.size; i++) a[i] = -a[i];
  return a;
}

// Packed vectors are aligned like their scalar.
template <class T, int N>
struct packed_vec {
  T e[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& v) {
    for (int i = 0; i < N; i++) e[i] = v[i];
  }
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = e[i];
    return r;
  }
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

#define VEC_NAMES(t)                      \
  typedef vec<t, 2> t##2;                 \
  typedef vec<t, 3> t##3;                 \
  typedef vec<t, 4> t##4;                 \
  typedef packed_vec<t, 2> packed_##t##2; \
  typedef packed_vec<t, 3> packed_##t##3; \
  typedef packed_vec<t, 4> packed_##t##4;
VEC_NAMES(float)
VEC_NAMES(half)
VEC_NAMES(bfloat)
VEC_NAMES(bool)
VEC_NAMES(char)
VEC_NAMES(short)
VEC_NAMES(int)
VEC_NAMES(long)
VEC_NAMES(uchar)
VEC_NAMES(ushort)
VEC_NAMES(uint)
VEC_NAMES(ulong)
#undef VEC_NAMES
}  // namespace metal
