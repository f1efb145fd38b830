// Checked mode. Kernels are compiled with -fsanitize=thread,alignment,bounds,shift,..., and these
// functions stand in for the sanitizers' own libraries. Each byte that threads can share
// (threadgroup memory, outputs) has a shadow: who touched it last, and after which barrier.
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <vector>

#include "internal.h"

#define CALLER_PC __builtin_return_address(0)

namespace emu {
namespace {
// Counted on by barriers that order the space. Kept apart per space, so that a barrier with the
// wrong mem_flags orders nothing.
struct Epochs {
  uint32_t now, group_start;
  uint32_t of_simdgroup[32];
};
Epochs device_epochs, threadgroup_epochs;

constexpr uint32_t kAtomic = ~0u;
struct Shadow {
  uint32_t writer;  // thread index + 1, 0 for none
  uint32_t write_epoch, write_simd_epoch;
  uint32_t read_epoch, read_simd_epoch;
  uint32_t reading_simdgroups, reading_lanes;  // bit masks, of read_epoch
};
std::vector<Shadow*> output_shadows;
Shadow* threadgroup_shadow;
constexpr size_t kShadowed = 64 << 10;

struct Place {
  Shadow* shadow;
  const Epochs* epochs;
  const char* name;
  size_t offset;
  bool has_values;
};

enum class Access { read, write, atomic };
const char* verb(Access a) { return a == Access::read ? "read" : "write"; }

bool locate_in_threadgroup(const char* p, size_t bytes, Access access, Place& place) {
  size_t offset = p - threadgroup_base();
  const Variable* v = variable_at(offset, bytes);
  if (!v) {
    const Variable* before = variable_before(offset);
    if (!before) fail("out-of-bounds", "%s before the first threadgroup variable", verb(access));
    fail("out-of-bounds",
         "%s of %zu bytes at byte %zu of threadgroup variable %s, which has %zu bytes",
         verb(access), bytes, offset - before->offset, before->name, before->bytes);
  }
  place = {threadgroup_shadow + offset, &threadgroup_epochs, v->name, offset - v->offset, false};
  return true;
}

// False for memory that needs no further check. Does not return for memory that is out of bounds.
bool locate(const char* p, size_t bytes, Access access, Place& place) {
  if (p >= current->stack_low && p < current->stack_high) return false;
  if (in_threadgroup_memory(p)) return locate_in_threadgroup(p, bytes, access, place);
  const Buffer* b = nearest_buffer(p);
  if (b && p >= b->data && p + bytes <= b->data + b->bytes) {
    if (!b->is_output) return false;
    size_t offset = p - b->data;
    place = {output_shadows[b - launch->buffers] + offset, &device_epochs, b->name, offset,
             bool(b->has_values)};
    return true;
  }
  if (b)
    fail("out-of-bounds", "%s of %zu bytes at byte %ld of %s, which has %zu bytes", verb(access),
         bytes, long(p - b->data), b->name, b->bytes);
  for (uint32_t i = 0; i < n_threads; i++)
    if (p >= threads[i].stack_low && p < threads[i].stack_high)
      fail("out-of-bounds", "%s of the private memory of thread %u", verb(access), i);
  // What is left are the kernel's own constants.
  Dl_info library;
  if (access != Access::read || !dladdr(p, &library))
    fail("out-of-bounds", "%s of %zu bytes at %p, in no buffer", verb(access), bytes,
         static_cast<const void*>(p));
  return false;
}

// Whether an access of this epoch by a lane of this simdgroup could run at the same time as one by
// `current`.
bool is_unordered(const Epochs& e, uint32_t epoch, uint32_t simdgroup, uint32_t simd_epoch) {
  if (epoch < e.group_start) return true;  // another threadgroup
  if (epoch < e.now) return false;
  return simdgroup != current->simdgroup->index || simd_epoch == e.of_simdgroup[simdgroup];
}

void check_race(const Shadow& s, const Place& place, size_t byte, Access access) {
  const Epochs& e = *place.epochs;
  uint32_t writer = s.writer - 1;
  bool is_other = writer != current->index || s.write_epoch < e.group_start;
  if (s.writer && s.writer != kAtomic && is_other &&
      is_unordered(e, s.write_epoch, writer / kLanes, s.write_simd_epoch))
    fail("data-race", "thread %u %ss byte %zu of %s that thread %u%s wrote with no barrier between",
         current->index, verb(access), place.offset + byte, place.name, writer,
         s.write_epoch < e.group_start ? " of another threadgroup" : "");
  if (access == Access::read || !s.reading_simdgroups) return;
  uint32_t mine = current->simdgroup->index;
  bool other_group = s.read_epoch < e.group_start;
  bool other_simdgroup = s.read_epoch == e.now && (s.reading_simdgroups & ~(1u << mine));
  bool other_lane = s.read_epoch == e.now && s.read_simd_epoch == e.of_simdgroup[mine] &&
                    (s.reading_lanes & ~(1u << current->lane));
  if (other_group || other_simdgroup || other_lane)
    fail("data-race",
         "thread %u writes byte %zu of %s that another %s read with no barrier between",
         current->index, place.offset + byte, place.name,
         other_group       ? "threadgroup"
         : other_simdgroup ? "simdgroup"
                           : "lane");
}

void record(Shadow& s, const Epochs& e, Access access) {
  uint32_t mine = current->simdgroup->index;
  if (access != Access::read) {
    s.writer = access == Access::atomic ? kAtomic : current->index + 1;
    s.write_epoch = e.now;
    s.write_simd_epoch = e.of_simdgroup[mine];
    return;
  }
  if (s.read_epoch != e.now) s.reading_simdgroups = s.reading_lanes = 0;
  if (s.read_simd_epoch != e.of_simdgroup[mine]) s.reading_lanes = 0;
  s.read_epoch = e.now;
  s.read_simd_epoch = e.of_simdgroup[mine];
  s.reading_simdgroups |= 1u << mine;
  s.reading_lanes |= 1u << current->lane;
}

void check(const void* address, size_t bytes, Access access, const void* pc) {
  if (!in_kernel) return;
  error_pc = pc;
  Place place;
  if (locate(static_cast<const char*>(address), bytes, access, place)) {
    for (size_t i = 0; i < bytes; i++) {
      Shadow& s = place.shadow[i];
      if (access == Access::read && !s.writer && !place.has_values)
        fail("uninitialised", "read of byte %zu of %s, which no thread wrote", place.offset + i,
             place.name);
      if (access != Access::atomic) check_race(s, place, i, access);
      record(s, *place.epochs, access);
    }
  }
  error_pc = nullptr;
}

void* new_shadow(size_t bytes) { return calloc(bytes + 1, sizeof(Shadow)); }
}  // namespace

void begin_checks() {
  if (!launch->checked) return;
  device_epochs = threadgroup_epochs = {};
  for (uint32_t i = 0; i < launch->n_buffers; i++) {
    const Buffer& b = launch->buffers[i];
    output_shadows.push_back(b.is_output ? static_cast<Shadow*>(new_shadow(b.bytes)) : nullptr);
  }
  threadgroup_shadow = static_cast<Shadow*>(new_shadow(kShadowed));
}

void end_checks() {
  for (Shadow* s : output_shadows) free(s);
  output_shadows.clear();
  free(threadgroup_shadow);
  threadgroup_shadow = nullptr;
}

void begin_threadgroup_checks() {
  if (!launch->checked) return;
  memset(threadgroup_shadow, 0, threadgroup_memory_end() * sizeof(Shadow));
  device_epochs.group_start = ++device_epochs.now;
  threadgroup_epochs.group_start = ++threadgroup_epochs.now;
}

// Flags are MSL's mem_flags: 1 device, 2 threadgroup.
void pass_barrier(uint32_t flags) {
  if (flags & 1) device_epochs.now++;
  if (flags & 2) threadgroup_epochs.now++;
}
void pass_simdgroup_barrier(uint32_t simdgroup, uint32_t flags) {
  if (flags & 1) device_epochs.of_simdgroup[simdgroup]++;
  if (flags & 2) threadgroup_epochs.of_simdgroup[simdgroup]++;
}

__attribute__((visibility("default"))) void atomic_access(void* p, size_t bytes) {
  if (launch->checked) check(p, bytes, Access::atomic, CALLER_PC);
}
}  // namespace emu

using namespace emu;

#define INSTRUMENTED(size)                                                                      \
  EXPORT void __tsan_read##size(void* p) { check(p, size, Access::read, CALLER_PC); }           \
  EXPORT void __tsan_write##size(void* p) { check(p, size, Access::write, CALLER_PC); }         \
  EXPORT void __tsan_unaligned_read##size(void* p) { check(p, size, Access::read, CALLER_PC); } \
  EXPORT void __tsan_unaligned_write##size(void* p) { check(p, size, Access::write, CALLER_PC); }
INSTRUMENTED(1)
INSTRUMENTED(2)
INSTRUMENTED(4)
INSTRUMENTED(8)
INSTRUMENTED(16)
EXPORT void __tsan_read_range(void* p, size_t n) { check(p, n, Access::read, CALLER_PC); }
EXPORT void __tsan_write_range(void* p, size_t n) { check(p, n, Access::write, CALLER_PC); }
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}

// The linker's --wrap sends copies of whole structs here.
EXPORT void* __wrap_memcpy(void* to, const void* from, size_t n) {
  if (n) check(from, n, Access::read, CALLER_PC), check(to, n, Access::write, CALLER_PC);
  return memcpy(to, from, n);
}
EXPORT void* __wrap_memset(void* to, int value, size_t n) {
  if (n) check(to, n, Access::write, CALLER_PC);
  return memset(to, value, n);
}

// What g++ passes to the handlers of the undefined behaviour sanitizer.
struct Location {
  const char* file;
  uint32_t line, column;
};
struct TypeName {
  uint16_t kind, info;
  char name[1];
};
struct OutOfBounds {
  Location at;
  const TypeName *array, *index;
};
struct Mismatch {
  Location at;
  const TypeName* type;
  uint8_t log_alignment, kind;
};
EXPORT void __ubsan_handle_out_of_bounds_abort(OutOfBounds* d, size_t index) {
  fail("out-of-bounds", "index %d of type %s at %s:%u", int(index), d->array->name, d->at.file,
       d->at.line);
}
EXPORT void __ubsan_handle_type_mismatch_v1_abort(Mismatch* d, size_t p) {
  if (!p) fail("out-of-bounds", "access through a null pointer at %s:%u", d->at.file, d->at.line);
  fail("misaligned", "%s needs %d-byte alignment, its address ends in 0x%02zx, at %s:%u",
       d->type->name, 1 << d->log_alignment, p & 0xff, d->at.file, d->at.line);
}
EXPORT void __ubsan_handle_shift_out_of_bounds_abort(Location* at, size_t, size_t bits) {
  fail("undefined", "shift by %d bits at %s:%u", int(bits), at->file, at->line);
}
EXPORT void __ubsan_handle_divrem_overflow_abort(Location* at, size_t, size_t) {
  fail("undefined", "integer division by zero or overflow at %s:%u", at->file, at->line);
}
