// MLX's file overloads constructors by address space, which C++ cannot; its utils.h needs only this
// much.
#pragma once

template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r = 0, T i = 0) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
