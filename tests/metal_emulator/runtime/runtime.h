// What a compiled kernel and the runtime share. Kernels may be instrumented, the runtime never is.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {
constexpr uint32_t kLanes = 32;
constexpr size_t kSlotBytes = 64;

struct Uint3 {
  uint32_t x, y, z;
};

// Where a thread waits. Flags are the mem_flags of a barrier.
struct Site {
  const char *what, *file;
  int line;
  uint32_t flags;
};

enum class State : uint8_t { ready, at_simd_function, at_barrier, returned };

struct Simdgroup;
struct Thread {
  void* stack_pointer;
  char *stack_low, *stack_high;
  Simdgroup* simdgroup;
  State state;
  Site site;
  uint64_t uniform;  // hash of arguments that must agree in the whole simdgroup
  uint32_t index, lane;
  Uint3 position_in_grid, position_in_threadgroup;
};

struct Simdgroup {
  Thread* lanes[kLanes];
  uint32_t index, size;
  uint32_t active;  // bit i: lane i takes part in the current round
  // Two buffers: a fast lane may leave its next value before a slow one has read the last.
  uint32_t turn;
  bool has_result[2];
  alignas(16) unsigned char slot[2][kLanes][kSlotBytes];
  alignas(16) unsigned char result[2][256];
};

struct Grid {
  Uint3 threads, threadgroups, threadgroup_limit, threadgroup_size, threadgroup_position;
};

extern Thread* current;
extern Grid grid;

uint32_t wait_for_simdgroup(Site site, uint64_t uniform);
void wait_at_barrier(Site site);
void atomic_access(void* p, size_t bytes);
void* threadgroup_memory(int id, size_t bytes, size_t alignment, const char* name);
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* kind, const char* format,
                                                             ...);

// `threadgroup float x[8];` in a kernel becomes a reference to this.
template <class T>
inline T& threadgroup_variable(int id, const char* name) {
  return *static_cast<T*>(threadgroup_memory(id, sizeof(T), alignof(T), name));
}
}  // namespace emu
