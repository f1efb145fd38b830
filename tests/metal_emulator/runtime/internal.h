// State that the parts of the runtime share. One launch runs at a time, on one operating system
// thread.
#pragma once
#include <csetjmp>

#include "runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emu {
// Mirrored by launcher.py.
struct Buffer {
  const char* name;
  char* data;
  size_t bytes;
  uint32_t is_output;
  uint32_t has_values;  // an output that starts with init_value may be read
};
struct Launch {
  void (*entry)(void* const*);
  void* const* arguments;
  const Buffer* buffers;
  uint32_t n_buffers;
  uint32_t grid[3], threadgroup[3];
  uint32_t schedule, seed, checked, timeout_s;
  uint32_t threadgroup_bytes;  // out
  uint64_t error_offset;       // out: place in the kernel's library
  char error[4096];            // out: "kind: text", empty when all went well
};

extern Launch* launch;
extern Thread* threads;
extern uint32_t n_threads;
extern bool in_kernel;
extern sigjmp_buf escape;  // where a signal handler goes
extern const void* error_pc;

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuard = 4 << 20;
constexpr size_t kThreadgroupLimit = 32 << 10;

// memory.cpp
struct Variable {
  size_t offset, bytes;
  const char* name;
};
void begin_threadgroup_memory();
void poison_threadgroup_memory();
size_t threadgroup_memory_used();
size_t threadgroup_memory_end();
char* threadgroup_base();
bool in_threadgroup_memory(const char* p);
const Variable* variable_at(size_t offset, size_t bytes);
const Variable* variable_before(size_t offset);
const Buffer* nearest_buffer(const char* p);
void install_fault_handlers();
void remove_fault_handlers();

// checks.cpp
void begin_checks();
void end_checks();
void begin_threadgroup_checks();
void pass_barrier(uint32_t flags);
void pass_simdgroup_barrier(uint32_t simdgroup, uint32_t flags);

// Keeps the first error only.
__attribute__((format(printf, 2, 3))) void report(const char* kind, const char* format, ...);
}  // namespace emu
