// Scalar types of MSL.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#define METAL_FUNC inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
constexpr half operator""h(long double x) { return half(x); }

// Converts to float by itself, but never from float or half (MSL's rule).
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  // MLX's own kernels rely on the implicit conversion from integers.
  template <class A, std::enable_if_t<std::is_integral_v<A>, int> = 0>
  bfloat(A x) : bits(round(float(x))) {}
  template <class A,
            std::enable_if_t<std::is_floating_point_v<A> || std::is_same_v<A, half>, int> = 0>
  explicit bfloat(A x) : bits(round(float(x))) {}
  static constexpr bfloat from_bits(uint16_t b) {
    bfloat r{};
    r.bits = b;
    return r;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }

 private:
  static uint16_t round(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    if (f != f) return uint16_t(u >> 16) | 0x40;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};
inline bfloat operator""bf(long double x) { return bfloat(float(x)); }
constexpr bfloat operator-(bfloat a) { return bfloat::from_bits(a.bits ^ 0x8000); }

// bfloat with an integer stays bfloat, with float it becomes float, with half it is an error.
#define BFLOAT_OPERATOR(op)                                                                    \
  inline bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }       \
  template <class A, class = std::enable_if_t<std::is_arithmetic_v<A>>>                        \
  inline std::conditional_t<std::is_integral_v<A>, bfloat, float> operator op(bfloat a, A b) { \
    return std::conditional_t<std::is_integral_v<A>, bfloat, float>(float(a) op float(b));     \
  }                                                                                            \
  template <class A, class = std::enable_if_t<std::is_arithmetic_v<A>>>                        \
  inline std::conditional_t<std::is_integral_v<A>, bfloat, float> operator op(A a, bfloat b) { \
    return std::conditional_t<std::is_integral_v<A>, bfloat, float>(float(a) op float(b));     \
  }                                                                                            \
  void operator op(bfloat, half) = delete;                                                     \
  void operator op(half, bfloat) = delete;                                                     \
  inline bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
BFLOAT_OPERATOR(+)
BFLOAT_OPERATOR(-)
BFLOAT_OPERATOR(*)
BFLOAT_OPERATOR(/)
#undef BFLOAT_OPERATOR

namespace metal {
using std::bool_constant, std::conditional, std::conditional_t, std::declval, std::enable_if,
    std::enable_if_t;
using std::false_type, std::integral_constant, std::is_convertible_v, std::is_integral,
    std::is_integral_v;
using std::is_same, std::is_same_v, std::is_signed_v, std::is_unsigned_v, std::make_unsigned_t;
using std::remove_cv_t, std::remove_pointer_t, std::remove_reference_t, std::true_type, std::void_t;

template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr int digits = 11;
  static constexpr half max() { return half(65504.0f); }
  static constexpr half lowest() { return half(-65504.0f); }
  static constexpr half min() { return half(6.103515625e-5f); }
  static constexpr half epsilon() { return half(0.0009765625f); }
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr int digits = 8;
  static constexpr bfloat max() { return bfloat::from_bits(0x7f7f); }
  static constexpr bfloat lowest() { return bfloat::from_bits(0xff7f); }
  static constexpr bfloat min() { return bfloat::from_bits(0x0080); }
  static constexpr bfloat epsilon() { return bfloat::from_bits(0x3c00); }
  static constexpr bfloat infinity() { return bfloat::from_bits(0x7f80); }
  static constexpr bfloat quiet_NaN() { return bfloat::from_bits(0x7fc0); }
};

template <class To, class From>
inline To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "MSL: as_type needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace metal
