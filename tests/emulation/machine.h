// The emulator's state, shared by its files and invisible to kernels.
#pragma once

#include <cstdint>

#include "cuda_emu.h"

namespace emu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

enum class State : uint8_t { kReady, kAtBarrier, kInCollective, kFinished };

struct Thread {
  void* stack_pointer;
  uintptr_t stack_low, stack_high;
  uint16_t index;
  uint8_t warp, lane;
  dim3 position;  // in the block
  State state;
  bool has_waited;   // for the previous kernel
  const void* site;  // where it waits
  void* argument;    // for the collective that it waits in
};

// A collective operation of the lanes of a warp: the last lane to arrive calls compute(arguments by
// lane, mask).
using Compute = void (*)(void* const* arguments, uint32_t mask);

struct Warp {
  uint32_t living;
  uint32_t arrived;  // at the collective below
  uint32_t mask;
  Compute compute;
  uint16_t epoch;  // counts the synchronisation points of its lanes
};

struct Block {
  dim3 index;
  uint32_t run;    // number of this block's run, unique in the process
  uint16_t epoch;  // counts its barriers
  int num_living;
  int num_at_barrier;
  const void* barrier_site;
};

struct Machine {
  Thread* current = nullptr;  // null: no kernel runs
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kWarpSize];
  Block block;
  dim3 grid_size, block_size;
  int num_threads = 0;
  uint32_t first_run = 1;  // of this launch
  bool is_aborted = false;
  bool is_dependent = false;  // this launch, or the next
};

extern Machine machine;

// Reports a fault by its kind: bounds, wild, align, uninit, async, race, blocks, dependent, mask,
// deadlock, barrier, ub, launch.
void report(const char* kind, const void* site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Waits until all lanes of the mask have arrived.
void collective(uint32_t mask, Compute compute, void* argument, const void* site);

// Checks an access by the running thread.
void check_access(const void* address, int size, bool is_write, bool is_atomic, const void* site);

// Shared memory: begin_launch forgets the launch's arrays, begin_block poisons them for the next
// block.
void begin_launch(size_t dynamic_bytes);
void begin_block();
void end_thread(int thread);  // drops its pending asynchronous copies, and reports that there are

// Maps zeroed memory; ends the process if there is none left.
void* reserve(size_t bytes);

// Unmaps the threads' stacks; the next launch maps them again.
void release_stacks();

// Returns a number below the limit, which is less than 2^32.
uint32_t next_random(uint64_t limit);

}  // namespace emu
