// 8x8 simdgroup matrices. A lane holds two neighbours of one row, in the layout that MLX's own
// kernels (steel) rely on.
#pragma once
#include "simdgroup.h"

namespace metal {
struct matrix_place {
  int row, column;
};
constexpr matrix_place place_of_lane(int lane) {
  int quad = lane / 4;
  return {(quad & 4) + lane / 2 % 4, (quad & 2) * 2 + lane % 2 * 2};
}

// Can be indexed, and reinterpreted as vec<T, 2> as MLX does. Apple documents no conversions.
template <class T>
struct alignas(2 * sizeof(T)) matrix_elements {
  T e[2];
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "MSL: simdgroup_matrix is 8x8");
  static_assert(is_floating_point_v<T>, "MSL: simdgroup_matrix holds half, bfloat or float");
  typedef matrix_elements<T> storage_type;
  storage_type elements;

  // NaN, so that an accumulator which nobody set shows.
  simdgroup_matrix() : elements{numeric_limits<T>::quiet_NaN(), numeric_limits<T>::quiet_NaN()} {}
  explicit simdgroup_matrix(T diagonal) {
    matrix_place at = place_of_lane(this_lane());
    elements = {at.row == at.column ? diagonal : T(0), at.row == at.column + 1 ? diagonal : T(0)};
  }
  storage_type& thread_elements() { return elements; }
  const storage_type& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = Columns>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> m;
  m.elements = {value, value};
  return m;
}

// Loads and stores do not need the other lanes, so only checked mode makes them meet.
template <class T>
inline void check_uniform(const char* what, const T* p, ulong stride, ulong2 origin, bool transpose,
                          const char* file, int line) {
#ifdef CHECKED
  const uint64_t parts[] = {stride, origin.x, origin.y, transpose};
  uint64_t hash = uint64_t(p);
  for (uint64_t part : parts) hash = hash * 1099511628211u + part;
  emu::wait_for_simdgroup({what, file, line, 0}, hash);
#endif
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* p, ulong elements_per_row = 8,
                           ulong2 origin = ulong2(0), bool transpose = false, CALLER) {
  check_uniform("simdgroup_load", p, elements_per_row, origin, transpose, file, line);
  matrix_place at = place_of_lane(this_lane());
  p += origin.y * elements_per_row + origin.x;
  for (int i = 0; i < 2; i++) {
    int column = at.column + i;
    m.elements[i] =
        transpose ? p[column * elements_per_row + at.row] : p[at.row * elements_per_row + column];
  }
}
template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* p, ulong elements_per_row = 8,
                            ulong2 origin = ulong2(0), bool transpose = false, CALLER) {
  check_uniform("simdgroup_store", p, elements_per_row, origin, transpose, file, line);
  matrix_place at = place_of_lane(this_lane());
  p += origin.y * elements_per_row + origin.x;
  for (int i = 0; i < 2; i++) {
    int column = at.column + i;
    (transpose ? p[column * elements_per_row + at.row] : p[at.row * elements_per_row + column]) =
        m.elements[i];
  }
}

struct multiply_operands {
  float a[2], b[2], c[2];
};
RAW inline void multiply_matrices(multiply_operands mine, float* out, const char* file, int line) {
  const char* what = "simdgroup_multiply_accumulate";
  uint turn = simd_leave(what, mine, 0, file, line);
  emu::Simdgroup* s = emu::current->simdgroup;
  float* d = reinterpret_cast<float*>(s->result[turn]);
  static_assert(sizeof s->result[0] >= 64 * sizeof(float));
  if (!s->has_result[turn]) {
    float a[8][8], b[8][8];
    for (uint lane = 0; lane < emu::kLanes; lane++) {
      multiply_operands held = simd_read<multiply_operands>(what, turn, lane, file, line);
      matrix_place at = place_of_lane(lane);
      for (int i = 0; i < 2; i++) {
        a[at.row][at.column + i] = held.a[i];
        b[at.row][at.column + i] = held.b[i];
        d[at.row * 8 + at.column + i] = held.c[i];
      }
    }
    for (int row = 0; row < 8; row++)
      for (int k = 0; k < 8; k++)
        for (int column = 0; column < 8; column++) d[row * 8 + column] += a[row][k] * b[k][column];
    s->has_result[turn] = true;
  }
  matrix_place at = place_of_lane(emu::current->lane);
  for (int i = 0; i < 2; i++) out[i] = d[at.row * 8 + at.column + i];
}

template <class D, class A, class B>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<D, 8, 8>& c, CALLER) {
  auto pair = [](auto& m, float* to) {
    to[0] = float(m.elements[0]), to[1] = float(m.elements[1]);
  };
  multiply_operands mine;
  pair(a, mine.a), pair(b, mine.b), pair(c, mine.c);
  float out[2];
  multiply_matrices(mine, out, file, line);
  d.elements = {D(out[0]), D(out[1])};
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, CALLER) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0)), file, line);
}
}  // namespace metal
