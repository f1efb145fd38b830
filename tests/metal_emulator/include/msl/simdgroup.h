// Barriers and simdgroup functions: every lane leaves its value, waits for the others, then reads.
#pragma once
#include "../../runtime/runtime.h"
#include "math.h"

// Code of the emulator itself inside a kernel: its accesses are not the kernel's, so they are not
// checked.
#define RAW __attribute__((noinline, no_sanitize("thread", "undefined")))
// Default arguments that name the line of the caller.
#define CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

inline void threadgroup_barrier(mem_flags flags, CALLER) {
  emu::wait_at_barrier({"threadgroup_barrier", file, line, uint(flags)});
}
inline void simdgroup_barrier(mem_flags flags, CALLER) {
  emu::wait_for_simdgroup({"simdgroup_barrier", file, line, uint(flags)}, 0);
}

template <class T>
struct is_simd_type {
  static constexpr bool value =
      is_floating_point_v<T> || (is_integral_v<T> && !is_same_v<T, bool> && sizeof(T) <= 4);
};
template <class T, int N>
struct is_simd_type<vec<T, N>> : is_simd_type<T> {};
#define CHECK_SIMD_TYPE(T)              \
  static_assert(is_simd_type<T>::value, \
                "MSL: simd functions take 8, 16 and 32 bit scalars and vectors of them")

// Leaves a value and waits. Returns the index of the buffer to read, as the next round may fill the
// other.
template <class T>
RAW uint simd_leave(const char* what, const T& value, uint64_t uniform, const char* file,
                    int line) {
  static_assert(sizeof(T) <= emu::kSlotBytes);
  emu::Simdgroup* s = emu::current->simdgroup;
  __builtin_memcpy(s->slot[s->turn][emu::current->lane], &value, sizeof value);
  return emu::wait_for_simdgroup({what, file, line, 0}, uniform);
}
template <class T>
RAW T simd_read(const char* what, uint turn, uint lane, const char* file, int line) {
  emu::Simdgroup* s = emu::current->simdgroup;
  if (lane >= emu::kLanes || !(s->active >> lane & 1))
    emu::fail("inactive-lane", "%s reads lane %d, which does not take part, at %s:%d", what,
              int(lane), file, line);
  T value;
  __builtin_memcpy(&value, s->slot[turn][lane], sizeof value);
  return value;
}
RAW inline int this_lane() { return emu::current->lane; }
RAW inline uint active_lanes() { return emu::current->simdgroup->active; }

// Reductions add pairwise (lane i with lane i + 16, then i + 8, ...), once per round.
template <class T, class F>
RAW T simd_fold(uint turn, F combine) {
  emu::Simdgroup* s = emu::current->simdgroup;
  T value[emu::kLanes];
  if (!s->has_result[turn]) {
    uint present = s->active;
    __builtin_memset(value, 0, sizeof value);
    for (uint i = 0; i < emu::kLanes; i++)
      if (present >> i & 1) __builtin_memcpy(&value[i], s->slot[turn][i], sizeof(T));
    for (uint step = emu::kLanes / 2; step; step /= 2) {
      for (uint i = 0; i < step; i++) {
        if (!(present >> (i + step) & 1)) continue;
        value[i] = present >> i & 1 ? combine(value[i], value[i + step]) : value[i + step];
        present |= 1u << i;
      }
    }
    __builtin_memcpy(s->result[turn], &value[0], sizeof(T));
    s->has_result[turn] = true;
  }
  __builtin_memcpy(&value[0], s->result[turn], sizeof(T));
  return value[0];
}
// MLX's bf16_math.h reduces bfloat in float.
template <class T>
using simd_sum_t = conditional_t<is_same_v<T, bfloat>, float, T>;

#define SIMD_REDUCTION(name, expression)                                    \
  template <class T>                                                        \
  inline T name(T x, CALLER) {                                              \
    CHECK_SIMD_TYPE(T);                                                     \
    using W = simd_sum_t<T>;                                                \
    uint turn = simd_leave(#name, W(x), 0, file, line);                     \
    return T(simd_fold<W>(turn, [](W a, W b) -> W { return expression; })); \
  }
SIMD_REDUCTION(simd_sum, W(a + b))
SIMD_REDUCTION(simd_product, W(a* b))
SIMD_REDUCTION(simd_max, max(a, b))
SIMD_REDUCTION(simd_min, min(a, b))
SIMD_REDUCTION(simd_and, W(a & b))
SIMD_REDUCTION(simd_or, W(a | b))
SIMD_REDUCTION(simd_xor, W(a ^ b))
#undef SIMD_REDUCTION

// A source lane outside the simdgroup keeps the lane's own value where `keep` says so.
#define SIMD_SHUFFLE(name, uniform, source, keep)                    \
  template <class T>                                                 \
  inline T name(T x, ushort d, CALLER) {                             \
    CHECK_SIMD_TYPE(T);                                              \
    uint turn = simd_leave(#name, x, uniform, file, line);           \
    [[maybe_unused]] int lane = this_lane();                         \
    int from = source;                                               \
    return (keep) ? x : simd_read<T>(#name, turn, from, file, line); \
  }
SIMD_SHUFFLE(simd_shuffle, 0, d, false)
SIMD_SHUFFLE(simd_shuffle_xor, d, lane ^ d, false)
SIMD_SHUFFLE(simd_shuffle_down, d, lane + d, from > 31)
SIMD_SHUFFLE(simd_shuffle_up, d, lane - d, from < 0)
SIMD_SHUFFLE(simd_shuffle_rotate_down, d, (lane + d) & 31, false)
SIMD_SHUFFLE(simd_shuffle_rotate_up, d, (lane - d) & 31, false)
SIMD_SHUFFLE(simd_broadcast, d, d, false)
#undef SIMD_SHUFFLE
template <class T>
inline T simd_broadcast_first(T x, CALLER) {
  CHECK_SIMD_TYPE(T);
  uint turn = simd_leave("simd_broadcast_first", x, 0, file, line);
  return simd_read<T>("simd_broadcast_first", turn, __builtin_ctz(active_lanes()), file, line);
}

// The filling of a lane comes from the lane that the shift wraps around to.
#define SIMD_SHUFFLE_AND_FILL(name, source)                         \
  template <class T>                                                \
  inline T name(T x, T filling, ushort d, CALLER) {                 \
    CHECK_SIMD_TYPE(T);                                             \
    struct pair {                                                   \
      T x, filling;                                                 \
    };                                                              \
    uint turn = simd_leave(#name, pair{x, filling}, d, file, line); \
    int from = source;                                              \
    pair got = simd_read<pair>(#name, turn, from & 31, file, line); \
    return from < 0 || from > 31 ? got.filling : got.x;             \
  }
SIMD_SHUFFLE_AND_FILL(simd_shuffle_and_fill_down, this_lane() + d)
SIMD_SHUFFLE_AND_FILL(simd_shuffle_and_fill_up, this_lane() - d)
#undef SIMD_SHUFFLE_AND_FILL

template <class T, class F>
RAW T simd_scan(uint turn, uint lanes, T total, F combine) {
  emu::Simdgroup* s = emu::current->simdgroup;
  for (uint i = 0; i < lanes; i++) {
    if (!(s->active >> i & 1)) continue;
    T value;
    __builtin_memcpy(&value, s->slot[turn][i], sizeof value);
    total = combine(total, value);
  }
  return total;
}
#define SIMD_SCAN(name, lanes, start, op)                                                   \
  template <class T>                                                                        \
  inline T name(T x, CALLER) {                                                              \
    CHECK_SIMD_TYPE(T);                                                                     \
    using W = simd_sum_t<T>;                                                                \
    uint turn = simd_leave(#name, W(x), 0, file, line);                                     \
    return T(simd_scan<W>(turn, lanes, W(start), [](W a, W b) -> W { return W(a op b); })); \
  }
SIMD_SCAN(simd_prefix_inclusive_sum, this_lane() + 1, 0, +)
SIMD_SCAN(simd_prefix_exclusive_sum, this_lane(), 0, +)
SIMD_SCAN(simd_prefix_inclusive_product, this_lane() + 1, 1, *)
SIMD_SCAN(simd_prefix_exclusive_product, this_lane(), 1, *)
#undef SIMD_SCAN

RAW inline uint simd_votes(const char* what, bool vote, const char* file, int line) {
  uint turn = simd_leave(what, uint(vote), 0, file, line), votes = 0;
  for (uint i = 0; i < emu::kLanes; i++)
    if (active_lanes() >> i & 1) votes |= simd_read<uint>(what, turn, i, file, line) << i;
  return votes;
}
struct simd_vote {
  using vote_t = ulong;
  vote_t votes;
  explicit simd_vote(vote_t v = 0) : votes(v) {}
  operator vote_t() const { return votes; }
};
inline simd_vote simd_ballot(bool x, CALLER) {
  return simd_vote(simd_votes("simd_ballot", x, file, line));
}
inline bool simd_all(bool x, CALLER) {
  return simd_votes("simd_all", x, file, line) == active_lanes();
}
inline bool simd_any(bool x, CALLER) { return simd_votes("simd_any", x, file, line) != 0; }
}  // namespace metal
