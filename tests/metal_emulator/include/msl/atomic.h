// Relaxed atomics of MSL. Threads of the emulator never run at once, so plain code is atomic
// enough.
#pragma once
#include "simdgroup.h"

namespace metal {
enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> ||
                    is_same_v<T, bool> || is_same_v<T, ulong>,
                "MSL: atomic<T> takes int, uint, float, bool or ulong");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#define ATOMIC_UPDATE(name, expression)                                                          \
  template <class T>                                                                             \
  RAW T atomic_##name##_explicit(volatile atomic<T>* p, std::common_type_t<T> b, memory_order) { \
    emu::atomic_access((void*)p, sizeof(T));                                                     \
    T a = p->value;                                                                              \
    p->value = expression;                                                                       \
    return a;                                                                                    \
  }
ATOMIC_UPDATE(fetch_add, a + b)
ATOMIC_UPDATE(fetch_sub, a - b)
ATOMIC_UPDATE(fetch_min, a < b ? a : b)
ATOMIC_UPDATE(fetch_max, a < b ? b : a)
ATOMIC_UPDATE(fetch_and, a & b)
ATOMIC_UPDATE(fetch_or, a | b)
ATOMIC_UPDATE(exchange, (void(a), b))
#undef ATOMIC_UPDATE
template <class T>
RAW T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  emu::atomic_access((void*)p, sizeof(T));
  return p->value;
}
template <class T>
RAW void atomic_store_explicit(volatile atomic<T>* p, std::common_type_t<T> b, memory_order) {
  emu::atomic_access((void*)p, sizeof(T));
  p->value = b;
}
}  // namespace metal
