// Runs a grid: one fibre per Metal thread, switched at barriers and simdgroup functions.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <algorithm>
#include <vector>

#include "internal.h"

#ifndef __x86_64__
#error "switch_stack is written for x86-64"
#endif

namespace emu {
__attribute__((visibility("default"))) Thread* current;
__attribute__((visibility("default"))) Grid grid;
Launch* launch;
Thread* threads;
uint32_t n_threads;
bool in_kernel;
sigjmp_buf escape;
const void* error_pc;

namespace {
enum Schedule : uint32_t { kForward, kReverse, kRandom };
constexpr uint32_t kMaxThreads = 1024;

char* stacks;
void* scheduler_stack;
std::vector<Simdgroup> simdgroups;
uint64_t random_state;

extern "C" void switch_stack(void** save, void* to);
asm(R"(.text
.globl switch_stack
.hidden switch_stack
.type switch_stack,@function
switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size switch_stack,.-switch_stack)");

void to_scheduler() { switch_stack(&current->stack_pointer, scheduler_stack); }

void run_thread(Thread* t) {
  current = t;
  in_kernel = true;
  switch_stack(&scheduler_stack, t->stack_pointer);
  in_kernel = false;
}

void thread_main() {
  launch->entry(launch->arguments);
  current->state = State::returned;
  to_scheduler();
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && a.flags == b.flags && !strcmp(a.what, b.what) &&
         !strcmp(a.file, b.file);
}
bool same_place(const Thread& a, const Thread& b) {
  return a.state == b.state && (a.state == State::returned || same_site(a.site, b.site));
}

// "31 threads at simd_sum k.source:4 (first: 1); 1 threads returned (first: 0)"
void describe_places(char* text, size_t size, const Thread* first, const Thread* last) {
  size_t used = 0;
  for (const Thread* t = first; t < last && used + 1 < size; t++) {
    if (std::any_of(first, t, [&](const Thread& o) { return same_place(o, *t); })) continue;
    long count = std::count_if(t, last, [&](const Thread& o) { return same_place(o, *t); });
    const char* separator = used ? "; " : "";
    if (t->state == State::returned)
      used += snprintf(text + used, size - used, "%s%ld threads returned (first: %u)", separator,
                       count, t->index);
    else
      used += snprintf(text + used, size - used, "%s%ld threads at %s %s:%d (first: %u)", separator,
                       count, t->site.what, t->site.file, t->site.line, t->index);
  }
}

const Uint3& group() { return grid.threadgroup_position; }

// All lanes must have arrived at the same simdgroup function. False after an error.
bool finish_simd_function(Simdgroup& s) {
  Thread& first = *s.lanes[0];
  bool together = true, uniform = true;
  for (uint32_t i = 0; i < s.size; i++) {
    together &= same_place(*s.lanes[i], first);
    uniform &= s.lanes[i]->uniform == first.uniform;
  }
  if (!together) {
    char places[1024];
    describe_places(places, sizeof places, &first, &first + s.size);
    report("divergent-simd", "simdgroup %u of threadgroup (%u,%u,%u) is not together: %s", s.index,
           group().x, group().y, group().z, places);
    return false;
  }
  if (!uniform) {
    report("non-uniform",
           "lanes of simdgroup %u pass different pointers, strides or lanes to %s at %s:%d",
           s.index, first.site.what, first.site.file, first.site.line);
    return false;
  }
  s.active = uint32_t((uint64_t(1) << s.size) - 1);
  pass_simdgroup_barrier(s.index, first.site.flags);
  s.turn ^= 1;
  s.has_result[s.turn] = false;
  for (uint32_t i = 0; i < s.size; i++) s.lanes[i]->state = State::ready;
  return true;
}

// Runs a simdgroup until all its lanes wait at a barrier or have returned. False after an error.
bool run_simdgroup(Simdgroup& s, const uint32_t* lane_order) {
  for (;;) {
    for (uint32_t k = 0; k < kLanes; k++) {
      uint32_t lane = lane_order[k];
      if (lane < s.size && s.lanes[lane]->state == State::ready) run_thread(s.lanes[lane]);
      if (launch->error[0]) return false;
    }
    bool waits = std::any_of(s.lanes, s.lanes + s.size,
                             [](Thread* t) { return t->state == State::at_simd_function; });
    if (!waits) return true;
    if (!finish_simd_function(s)) return false;
  }
}

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 33) % n;
}

void arrange(uint32_t* order, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) order[i] = launch->schedule == kReverse ? n - 1 - i : i;
  if (launch->schedule != kRandom) return;
  for (uint32_t i = n; i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}

void place_threads(Uint3 size) {
  grid.threadgroup_size = size;
  n_threads = size.x * size.y * size.z;
  simdgroups.resize((n_threads + kLanes - 1) / kLanes);
  for (uint32_t i = 0; i < simdgroups.size(); i++) {
    Simdgroup& s = simdgroups[i];
    s.index = i;
    s.size = std::min(kLanes, n_threads - i * kLanes);
    s.turn = 0;
    s.has_result[0] = false;
  }
  for (uint32_t i = 0; i < n_threads; i++) {
    Thread& t = threads[i];
    t.index = i;
    t.lane = i % kLanes;
    t.simdgroup = &simdgroups[i / kLanes];
    t.simdgroup->lanes[t.lane] = &t;
    t.state = State::ready;
    t.position_in_threadgroup = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    const Uint3 &in = t.position_in_threadgroup, &limit = grid.threadgroup_limit;
    t.position_in_grid = {group().x * limit.x + in.x, group().y * limit.y + in.y,
                          group().z * limit.z + in.z};
    t.stack_low = stacks + i * kStackBytes + kPage;
    t.stack_high = stacks + (i + 1) * kStackBytes;
    void** top = reinterpret_cast<void**>(t.stack_high - 16);
    *--top = nullptr;  // aligns the stack as after a call
    *--top = reinterpret_cast<void*>(thread_main);
    for (int saved_registers = 0; saved_registers < 6; saved_registers++) *--top = nullptr;
    t.stack_pointer = top;
  }
}

bool run_threadgroup(Uint3 size) {
  place_threads(size);
  poison_threadgroup_memory();
  begin_threadgroup_checks();
  uint32_t simdgroup_order[kMaxThreads / kLanes], lane_order[kLanes];
  for (;;) {
    arrange(simdgroup_order, simdgroups.size());
    arrange(lane_order, kLanes);
    for (uint32_t k = 0; k < simdgroups.size(); k++)
      if (!run_simdgroup(simdgroups[simdgroup_order[k]], lane_order)) return false;
    Thread *first = threads, *last = threads + n_threads;
    if (!std::all_of(first, last, [&](const Thread& t) { return same_place(t, *first); })) {
      char places[1024];
      describe_places(places, sizeof places, first, last);
      report("divergent-barrier", "threadgroup (%u,%u,%u) is not together: %s", group().x,
             group().y, group().z, places);
      return false;
    }
    if (first->state == State::returned) return true;
    pass_barrier(first->site.flags);
    for (Thread* t = first; t < last; t++) t->state = State::ready;
  }
}

void run_grid() {
  const Uint3 &all = grid.threads, &limit = grid.threadgroup_limit, &groups = grid.threadgroups;
  std::vector<uint32_t> order(groups.x * groups.y * groups.z);
  arrange(order.data(), order.size());
  for (uint32_t i : order) {
    Uint3 at = {i % groups.x, i / groups.x % groups.y, i / groups.x / groups.y};
    grid.threadgroup_position = at;
    // Groups at the edge of the grid are smaller.
    Uint3 size = {std::min(limit.x, all.x - at.x * limit.x),
                  std::min(limit.y, all.y - at.y * limit.y),
                  std::min(limit.z, all.z - at.z * limit.z)};
    if (!run_threadgroup(size)) return;
  }
}

void write_message(const char* kind, const char* format, va_list arguments) {
  if (launch->error[0]) return;
  constexpr size_t size = sizeof launch->error;
  size_t used = snprintf(launch->error, size, "%s: ", kind);
  used += vsnprintf(launch->error + used, size - used, format, arguments);
  if (in_kernel && used < size)
    snprintf(launch->error + used, size - used, " [thread %u of threadgroup (%u,%u,%u)]",
             current->index, group().x, group().y, group().z);
}
}  // namespace

void report(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_message(kind, format, arguments);
  va_end(arguments);
}

__attribute__((visibility("default"))) void fail(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_message(kind, format, arguments);
  va_end(arguments);
  to_scheduler();
  __builtin_unreachable();
}

__attribute__((visibility("default"))) uint32_t wait_for_simdgroup(Site site, uint64_t uniform) {
  uint32_t turn = current->simdgroup->turn;
  current->state = State::at_simd_function;
  current->site = site;
  current->uniform = uniform;
  to_scheduler();
  return turn;
}

__attribute__((visibility("default"))) void wait_at_barrier(Site site) {
  current->state = State::at_barrier;
  current->site = site;
  to_scheduler();
}
}  // namespace emu

using namespace emu;

EXPORT void emu_launch(Launch* request) {
  launch = request;
  error_pc = nullptr;
  const uint32_t *g = launch->grid, *t = launch->threadgroup;
  grid.threads = {g[0], g[1], g[2]};
  grid.threadgroup_limit = {std::min(t[0], g[0]), std::min(t[1], g[1]), std::min(t[2], g[2])};
  const Uint3& limit = grid.threadgroup_limit;
  grid.threadgroups = {(g[0] + limit.x - 1) / limit.x, (g[1] + limit.y - 1) / limit.y,
                       (g[2] + limit.z - 1) / limit.z};
  random_state = launch->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (uint32_t i = 0; i < kMaxThreads; i++) mprotect(stacks + i * kStackBytes, kPage, PROT_NONE);
  }
  std::vector<Thread> storage(kMaxThreads);
  threads = storage.data();
  begin_threadgroup_memory();
  begin_checks();
  install_fault_handlers();
  if (!sigsetjmp(escape, 1)) run_grid();
  in_kernel = false;
  remove_fault_handlers();
  end_checks();
  launch->threadgroup_bytes = threadgroup_memory_used();
  Dl_info library;
  if (error_pc && dladdr(error_pc, &library))
    launch->error_offset =
        static_cast<const char*>(error_pc) - static_cast<const char*>(library.dli_fbase);
  current = nullptr;
}
