// Buffers between guard zones, the threadgroup memory, and what a hardware fault in a kernel means.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <algorithm>
#include <vector>

#include "internal.h"

namespace emu {
namespace {
constexpr size_t kArena = 64 << 10;  // more than the limit, to leave room for red zones
constexpr size_t kRedZone = 64;
constexpr size_t kBufferAlignment = 16;

char* arena;
size_t arena_end, arena_used;
std::vector<Variable> variables;

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

char* map_guarded(size_t bytes) {
  void* all = mmap(nullptr, bytes + 2 * kGuard, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* body = static_cast<char*>(all) + kGuard;
  mprotect(body, bytes, PROT_READ | PROT_WRITE);
  return body;
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
struct sigaction old_actions[5];
stack_t old_signal_stack;
pthread_t kernel_thread;

void set_timer(long seconds, long microseconds) {
  itimerval timer = {};
  timer.it_value = {seconds, microseconds};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void report_memory_fault(const char* p) {
  for (uint32_t i = 0; i < n_threads; i++)
    if (p < threads[i].stack_low && p >= threads[i].stack_low - kPage)
      return report("out-of-bounds", "more than %zu KiB of private memory in one thread",
                    kStackBytes >> 10);
  const Buffer* near = nearest_buffer(p);
  if (near)
    return report("out-of-bounds", "access to byte %ld of %s, which has %zu bytes",
                  long(p - near->data), near->name, near->bytes);
  report("out-of-bounds", "access to address %p, in no buffer", static_cast<const void*>(p));
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), kernel_thread) && signal == SIGVTALRM) {
    pthread_kill(kernel_thread, signal);
    return;
  }
  if (signal == SIGVTALRM && !in_kernel) return set_timer(0, 10000);
  if (!pthread_equal(pthread_self(), kernel_thread) || !in_kernel) {
    // Not the kernel's fault: let it happen again under the handler that was there before.
    for (int i = 0; i < 5; i++)
      if (kSignals[i] == signal) sigaction(signal, &old_actions[i], nullptr);
    return;
  }
  error_pc =
      reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
  if (signal == SIGVTALRM)
    report("timeout", "the kernel did not end within %u seconds", launch->timeout_s);
  else if (signal == SIGFPE)
    report("undefined", "integer division by zero or overflow");
  else if (signal == SIGILL)
    report("undefined", "illegal instruction: the compiler found undefined behaviour");
  else
    report_memory_fault(static_cast<char*>(info->si_addr));
  siglongjmp(escape, 1);
}
}  // namespace

void begin_threadgroup_memory() {
  if (!arena) arena = map_guarded(kArena);
  arena_end = kRedZone;
  arena_used = 0;
  variables.clear();
}

// NaN as a float, half or bfloat.
void poison_threadgroup_memory() { memset(arena, 0xff, std::max(arena_end, kThreadgroupLimit)); }

size_t threadgroup_memory_used() { return arena_used; }
size_t threadgroup_memory_end() { return arena_end; }
char* threadgroup_base() { return arena; }
bool in_threadgroup_memory(const char* p) { return p >= arena && p < arena + kArena; }

__attribute__((visibility("default"))) void* threadgroup_memory(int id, size_t bytes,
                                                                size_t alignment,
                                                                const char* name) {
  if (size_t(id) >= variables.size()) variables.resize(id + 1);
  Variable& v = variables[id];
  if (!v.name) {
    size_t offset = round_up(arena_end, std::max(alignment, kBufferAlignment));
    arena_used += round_up(bytes, kBufferAlignment);
    if (arena_used > kThreadgroupLimit)
      fail("threadgroup-memory", "%zu bytes of threadgroup memory at variable %s, the limit is %zu",
           arena_used, name, kThreadgroupLimit);
    v = {offset, bytes, name};
    arena_end = offset + bytes + kRedZone;
  }
  return arena + v.offset;
}

const Variable* variable_at(size_t offset, size_t bytes) {
  for (const Variable& v : variables)
    if (v.name && offset >= v.offset && offset + bytes <= v.offset + v.bytes) return &v;
  return nullptr;
}

const Variable* variable_before(size_t offset) {
  const Variable* best = nullptr;
  for (const Variable& v : variables)
    if (v.name && v.offset <= offset && (!best || v.offset > best->offset)) best = &v;
  return best;
}

const Buffer* nearest_buffer(const char* p) {
  const Buffer* best = nullptr;
  size_t best_distance = kGuard;
  for (uint32_t i = 0; i < launch->n_buffers; i++) {
    const Buffer& b = launch->buffers[i];
    size_t distance = p < b.data ? b.data - p : p >= b.data + b.bytes ? p - b.data - b.bytes : 0;
    if (distance < best_distance) best = &b, best_distance = distance;
  }
  return best;
}

void install_fault_handlers() {
  static char signal_stack[64 << 10];
  stack_t stack = {signal_stack, 0, sizeof signal_stack};
  kernel_thread = pthread_self();
  sigaltstack(&stack, &old_signal_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 5; i++) sigaction(kSignals[i], &action, &old_actions[i]);
  set_timer(launch->timeout_s, 0);
}

void remove_fault_handlers() {
  set_timer(0, 0);
  for (int i = 0; i < 5; i++) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_signal_stack, nullptr);
}
}  // namespace emu

using namespace emu;

// A buffer ends at a guard zone, up to its alignment. Its start is aligned as MLX's buffers are.
EXPORT void* emu_map(size_t bytes) {
  size_t rounded = round_up(bytes, kBufferAlignment), body = round_up(rounded, kPage);
  char* p = map_guarded(body);
  return p ? p + body - rounded : nullptr;
}

EXPORT void emu_unmap(void* p, size_t bytes) {
  size_t rounded = round_up(bytes, kBufferAlignment), body = round_up(rounded, kPage);
  munmap(static_cast<char*>(p) + rounded - body - kGuard, body + 2 * kGuard);
}
