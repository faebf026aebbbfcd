// The device's memory, the state tracked for every two bytes of it, and the hooks that check every
// access.
#include <link.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "machine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emu {
namespace {

constexpr size_t kSharedBytes = size_t{1} << 20;
constexpr size_t kArenaBytes = size_t{1} << 28;  // the shared memory, then buffers
constexpr size_t kRedZone = 512;
constexpr uint8_t kManyWarps = 255, kManyLanes = 255;

struct Cell {  // state of two bytes; the masks have one bit per byte
  uint32_t write_run, read_run;
  uint16_t write_epoch, write_warp_epoch, write_thread;
  uint16_t read_epoch, read_warp_epoch;
  uint8_t read_warp, read_lane;
  uint8_t allocated : 2, forbidden : 2, written : 2, is_atomic : 1, is_pending : 1;
  uint8_t is_constant;
};

// An access, and the state of the thread that makes it: read once for all cells of the access.
struct Access {
  const void* site;
  uint32_t run, first_run;
  uint16_t epoch, warp_epoch, thread;
  uint8_t warp, lane;
  bool is_write, is_atomic, has_waited;

  Access(bool writes, bool atomic, const void* place)
      : site(place),
        run(machine.block.run),
        first_run(machine.first_run),
        epoch(machine.block.epoch),
        warp_epoch(machine.warps[machine.current->warp].epoch),
        thread(machine.current->index),
        warp(machine.current->warp),
        lane(machine.current->lane),
        is_write(writes),
        is_atomic(atomic),
        has_waited(machine.current->has_waited) {}
};

struct Copy {
  char* target;
  const char* source;  // null: zeros
};
struct CopyQueue {
  std::vector<Copy> open;                 // not yet committed
  std::vector<std::vector<Copy>> groups;  // oldest first
};

uint8_t* arena = nullptr;
Cell* cells = nullptr;
size_t arena_top = kSharedBytes;
size_t shared_top = 0;
std::map<const void*, size_t> shared_arrays;  // of this launch
CopyQueue queues[kMaxThreads];
uintptr_t library_low = ~uintptr_t{0}, library_high = 0;

std::string reports;
int num_reports = 0;
bool allows_host = false;

void find_library() {
  const auto visit = [](dl_phdr_info* info, size_t, void* self) {
    uintptr_t low = ~uintptr_t{0}, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      low = std::min(low, begin);
      high = std::max(high, begin + info->dlpi_phdr[i].p_memsz);
    }
    const auto address = reinterpret_cast<uintptr_t>(self);
    if (address < low || address >= high) return 0;
    library_low = low;
    library_high = high;
    return 1;
  };
  dl_iterate_phdr(visit, &machine);
}

void open_arena() {
  if (arena != nullptr) return;
  arena = static_cast<uint8_t*>(reserve(kArenaBytes));
  cells = static_cast<Cell*>(reserve(kArenaBytes / 2 * sizeof(Cell)));
  find_library();
}

void set_allocated(size_t offset, size_t bytes, bool is_allocated) {
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {  // the offset is even
    cells[i].forbidden = 0;
    cells[i].allocated = is_allocated ? 3 : 0;
  }
  if (is_allocated && bytes % 2) cells[(offset + bytes) / 2].allocated = 1;
}

size_t allocate_shared(size_t bytes) {
  const size_t offset = (shared_top + kRedZone + 127) / 128 * 128;
  if (offset + bytes + kRedZone > kSharedBytes) {
    report("launch", nullptr, "more than %zu bytes of shared memory", kSharedBytes);
    return kRedZone;
  }
  set_allocated(offset, bytes, true);
  shared_top = offset + bytes;
  std::memset(arena + offset, 0xff, bytes);
  return offset;
}

const char* space_of(size_t offset) { return offset < kSharedBytes ? "shared" : "device"; }

// Returns whether an earlier access by another thread of a warp of this block is ordered before
// this one.
inline bool is_ordered(const Access& access, int warp, uint16_t warp_epoch, uint16_t epoch) {
  return warp == access.warp ? warp_epoch != access.warp_epoch : epoch != access.epoch;
}

inline bool check_write_before(const Cell& cell, const Access& access, uint8_t mask,
                               size_t offset) {
  if ((cell.written & mask) == 0 || (access.is_atomic && cell.is_atomic)) return true;
  if (cell.write_run == access.run) {
    if (cell.write_thread == access.thread) return true;
    if (is_ordered(access, cell.write_thread / kWarpSize, cell.write_warp_epoch, cell.write_epoch))
      return true;
    report("race", access.site, "thread %d meets thread %d's write at %s + %zu", access.thread,
           cell.write_thread, space_of(offset), offset);
    return false;
  }
  if (offset >= kSharedBytes && cell.write_run >= access.first_run) {
    report("blocks", access.site, "memory that another block of this launch wrote, at device + %zu",
           offset);
    return false;
  }
  return true;
}

inline bool check_read_before(const Cell& cell, const Access& access, size_t offset) {
  if (cell.read_run != access.run) {
    if (offset < kSharedBytes || cell.read_run < access.first_run) return true;
    report("blocks", access.site, "memory that another block of this launch read, at device + %zu",
           offset);
    return false;
  }
  if (cell.read_warp == access.warp) {
    if (cell.read_lane == access.lane || cell.read_warp_epoch != access.warp_epoch) return true;
  } else if (cell.read_epoch != access.epoch) {
    return true;
  }
  report("race", access.site, "thread %d writes what another thread still reads at %s + %zu",
         access.thread, space_of(offset), offset);
  return false;
}

inline void note_read(Cell& cell, const Access& access) {
  const bool is_same_epoch = cell.read_run == access.run && cell.read_epoch == access.epoch;
  if (is_same_epoch && cell.read_warp != access.warp) {
    cell.read_warp = kManyWarps;
  } else if (is_same_epoch && cell.read_warp_epoch == access.warp_epoch) {
    if (cell.read_lane != access.lane) cell.read_lane = kManyLanes;
  } else {
    cell.read_run = access.run;
    cell.read_epoch = access.epoch;
    cell.read_warp = access.warp;
    cell.read_lane = access.lane;
  }
  cell.read_warp_epoch = access.warp_epoch;
}

inline void note_write(Cell& cell, const Access& access, uint8_t mask) {
  const bool is_of_run = cell.write_run == access.run;
  const bool is_kept = is_of_run && (access.run != 0 || cell.write_thread == access.thread);
  cell.written = uint8_t(is_kept ? cell.written | mask : mask);
  cell.write_run = access.run;
  cell.write_thread = access.thread;
  cell.write_epoch = access.epoch;
  cell.write_warp_epoch = access.warp_epoch;
  cell.is_atomic = access.is_atomic;
}

inline void check_cell(Cell& cell, const Access& access, uint8_t mask, size_t offset) {
  const char* const what = access.is_write ? "a write" : "a read";
  if ((cell.allocated & mask) != mask) {
    report("bounds", access.site, "%s outside of any buffer, at %s + %zu", what, space_of(offset),
           offset);
    return;
  }
  if (cell.forbidden & mask) {
    report("bounds", access.site, "%s of forbidden memory, at device + %zu", what, offset);
    return;
  }
  const bool is_shared = offset < kSharedBytes;
  if (!is_shared && !access.has_waited && (access.is_write || !cell.is_constant)) {
    report("dependent", access.site, "%s before the wait for the kernel before, at device + %zu",
           what, offset);
    return;
  }
  if (cell.is_pending) {
    report("async", access.site, "memory that a copy is still to fill, at shared + %zu", offset);
    return;
  }
  if (is_shared && !access.is_write &&
      (cell.write_run != access.run || (cell.written & mask) != mask)) {
    report("uninit", access.site, "shared memory that this block never wrote, at shared + %zu",
           offset);
    return;
  }
  if (!check_write_before(cell, access, mask, offset)) return;
  if (access.is_write || access.is_atomic) {
    if (!access.is_atomic && !check_read_before(cell, access, offset)) return;
    note_write(cell, access, mask);
  } else {
    note_read(cell, access);
  }
}

// The address is neither in the device's memory nor on this thread's stack; only constants of this
// library may be read.
void check_elsewhere(uintptr_t address, bool is_write, const void* site) {
  const Thread& thread = *machine.current;
  if (address >= thread.stack_low && address < thread.stack_high) return;
  if (allows_host || (!is_write && address >= library_low && address < library_high)) return;
  report("wild", site, "%s of %p", is_write ? "a write" : "a read",
         reinterpret_cast<void*>(address));
}

}  // namespace

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("the emulated device's memory");
    std::abort();
  }
  return memory;
}

void report(const char* kind, const void* site, const char* format, ...) {
  if (++num_reports > 8) return;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  char line[600];
  const auto address = reinterpret_cast<uintptr_t>(site);
  snprintf(
      line, sizeof(line), "%s|%zx|%s\n", kind,
      address >= library_low && address < library_high ? size_t(address - library_low) : size_t{0},
      text);
  reports += line;
}

void check_access(const void* address, int size, bool is_write, bool is_atomic, const void* site) {
  if (machine.current == nullptr) return;
  const size_t offset = static_cast<const uint8_t*>(address) - arena;
  if (offset >= kArenaBytes)
    return check_elsewhere(reinterpret_cast<uintptr_t>(address), is_write, site);
  const Access access(is_write, is_atomic, site);
  const size_t end = offset + size_t(size);
  for (size_t i = offset & ~size_t{1}; i < end; i += 2) {
    const uint8_t mask = uint8_t((i >= offset ? 1 : 0) | (i + 1 < end ? 2 : 0));
    check_cell(cells[i / 2], access, mask, i);
  }
}

void begin_launch(size_t dynamic_bytes) {
  open_arena();
  if (shared_top > 0) set_allocated(0, shared_top, false);
  shared_top = 0;
  shared_arrays.clear();
  shared_arrays[nullptr] = allocate_shared(dynamic_bytes);
}

void begin_block() { std::memset(arena, 0xff, shared_top); }

void* shared_array(const void* key, size_t bytes) {
  const auto found = shared_arrays.find(key);
  if (found != shared_arrays.end()) return arena + found->second;
  return arena + (shared_arrays[key] = allocate_shared(bytes));
}

void* dynamic_shared() { return arena + shared_arrays[nullptr]; }

void atomic_access(void* address, int size) {
  check_access(address, size, true, true, __builtin_return_address(0));
}

void async_copy16(void* shared, const void* global, bool is_valid) {
  const void* site = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      (is_valid && reinterpret_cast<uintptr_t>(global) % 16)) {
    report("align", site, "an asynchronous copy of 16 bytes between %p and %p", global, shared);
  }
  const size_t offset = static_cast<uint8_t*>(shared) - arena;
  if (offset >= kSharedBytes)
    return report("bounds", site, "the target of an asynchronous copy is not shared");
  if (is_valid) check_access(global, 16, false, false, site);
  check_access(shared, 16, true, false, site);
  std::memset(shared, 0xff, 16);
  for (int i = 0; i < 8; ++i) cells[offset / 2 + size_t(i)].is_pending = 1;
  queues[machine.current->index].open.push_back(
      {static_cast<char*>(shared), is_valid ? static_cast<const char*>(global) : nullptr});
}

void async_commit() {
  CopyQueue& queue = queues[machine.current->index];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void async_wait(int num_pending) {
  CopyQueue& queue = queues[machine.current->index];
  while (int(queue.groups.size()) > num_pending) {
    for (const Copy& copy : queue.groups.front()) {
      const size_t cell = size_t(reinterpret_cast<uint8_t*>(copy.target) - arena) / 2;
      for (int i = 0; i < 8; ++i) cells[cell + size_t(i)].is_pending = 0;
      check_access(copy.target, 16, true, false, __builtin_return_address(0));
      if (copy.source != nullptr) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
    queue.groups.erase(queue.groups.begin());
  }
}

void end_thread(int thread) {
  CopyQueue& queue = queues[thread];
  queue.groups.push_back(std::move(queue.open));
  size_t num_pending = 0;
  for (const auto& group : queue.groups) {
    num_pending += group.size();
    for (const Copy& copy : group) {
      const size_t cell = size_t(reinterpret_cast<uint8_t*>(copy.target) - arena) / 2;
      for (int i = 0; i < 8; ++i) cells[cell + size_t(i)].is_pending = 0;
    }
  }
  queue.open.clear();
  queue.groups.clear();
  if (num_pending > 0 && !machine.is_aborted) {
    report("async", nullptr, "thread %d ended before %zu of its copies", thread, num_pending);
  }
}

}  // namespace emu

// Allocates device memory, all bytes 0xff (NaN in every type), with red zones on both sides.
EXPORT void* emu_allocate(size_t bytes) {
  using namespace emu;
  open_arena();
  const size_t offset = (arena_top + kRedZone + 255) / 256 * 256;
  if (offset + bytes + kRedZone > kArenaBytes) return nullptr;
  set_allocated(offset, bytes, true);
  std::memset(arena + offset, 0xff, bytes);
  arena_top = offset + bytes;
  return arena + offset;
}

EXPORT void emu_forbid(void* begin, size_t bytes, bool is_forbidden) {
  using namespace emu;
  const size_t offset = static_cast<uint8_t*>(begin) - arena;
  for (size_t i = offset; i < offset + bytes; ++i) {
    const uint8_t bit = uint8_t(1u << (i & 1));
    Cell& cell = cells[i / 2];
    cell.forbidden = (is_forbidden ? cell.forbidden | bit : cell.forbidden & ~bit) & 3;
  }
}

// Marks memory that no kernel writes.
EXPORT void emu_make_constant(void* begin, size_t bytes) {
  using namespace emu;
  const size_t offset = static_cast<uint8_t*>(begin) - arena;
  for (size_t i = offset; i < offset + bytes; ++i) cells[i / 2].is_constant = 1;
}

// Allows kernels to access the host's memory, whose state is not tracked: for tests of code built
// on the kernels.
EXPORT void emu_allow_host(bool allows) { emu::allows_host = allows; }

// Unmaps all buffers and stacks; the next use maps them again.
EXPORT void emu_close() {
  using namespace emu;
  release_stacks();
  if (arena == nullptr) return;
  munmap(arena, kArenaBytes);
  munmap(cells, kArenaBytes / 2 * sizeof(Cell));
  arena = nullptr;
  cells = nullptr;
  arena_top = kSharedBytes;
}

// Frees all buffers and discards all reports.
EXPORT void emu_reset() {
  using namespace emu;
  open_arena();
  std::memset(cells + kSharedBytes / 2, 0,
              (arena_top - kSharedBytes + kRedZone) / 2 * sizeof(Cell));
  arena_top = kSharedBytes;
  reports.clear();
  num_reports = 0;
}

// Returns lines of "kind|offset of the place in this library|text".
EXPORT const char* emu_reports() { return emu::reports.c_str(); }

#define HOOKS(size)                                                                             \
  EXPORT void __tsan_read##size(void* p) {                                                      \
    if (reinterpret_cast<uintptr_t>(p) % size && emu::machine.current) {                        \
      emu::report("align", __builtin_return_address(0), "a read of " #size " bytes at %p", p);  \
    }                                                                                           \
    emu::check_access(p, size, false, false, __builtin_return_address(0));                      \
  }                                                                                             \
  EXPORT void __tsan_write##size(void* p) {                                                     \
    if (reinterpret_cast<uintptr_t>(p) % size && emu::machine.current) {                        \
      emu::report("align", __builtin_return_address(0), "a write of " #size " bytes at %p", p); \
    }                                                                                           \
    emu::check_access(p, size, true, false, __builtin_return_address(0));                       \
  }                                                                                             \
  EXPORT void __tsan_unaligned_read##size(void* p) {                                            \
    emu::check_access(p, size, false, false, __builtin_return_address(0));                      \
  }                                                                                             \
  EXPORT void __tsan_unaligned_write##size(void* p) {                                           \
    emu::check_access(p, size, true, false, __builtin_return_address(0));                       \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
EXPORT void __tsan_read_range(void* p, size_t size) {
  emu::check_access(p, int(size), false, false, __builtin_return_address(0));
}
EXPORT void __tsan_write_range(void* p, size_t size) {
  emu::check_access(p, int(size), true, false, __builtin_return_address(0));
}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}

#define UNDEFINED(name, what, ...)                        \
  EXPORT void __ubsan_handle_##name(__VA_ARGS__) {        \
    emu::report("ub", __builtin_return_address(0), what); \
  }
UNDEFINED(out_of_bounds, "an index past its array", void*, void*)
UNDEFINED(shift_out_of_bounds, "a shift past the width", void*, void*, void*)
UNDEFINED(add_overflow, "a sum overflows", void*, void*, void*)
UNDEFINED(sub_overflow, "a difference overflows", void*, void*, void*)
UNDEFINED(mul_overflow, "a product overflows", void*, void*, void*)
UNDEFINED(negate_overflow, "a negation overflows", void*, void*)
UNDEFINED(divrem_overflow, "a division by zero, or one that overflows", void*, void*, void*)
UNDEFINED(type_mismatch_v1, "a pointer that is null or not aligned for its type", void*, void*)
