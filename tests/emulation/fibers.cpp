// Blocks, threads, barriers and warp operations: each thread is a fiber, and a seed determines the
// schedule.
#include <sys/mman.h>

#include <cstdio>
#include <vector>

#include "machine.h"

namespace emu {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;

void* scheduler_stack = nullptr;
std::vector<int> ready;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
uint64_t random_state = 1;

// Saves the callee-saved registers on this stack and continues on the other one.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

// Makes a random ready thread the running one, and returns where it continues.
void* choose_next() {
  const size_t choice = next_random(ready.size());
  std::swap(ready[choice], ready.back());
  machine.current = &machine.threads[ready.back()];
  ready.pop_back();
  return machine.current->stack_pointer;
}

// Continues another ready thread, or the scheduler if there is none. A way through the scheduler
// would be two switches, whose returns the processor would predict wrongly: threads mostly wait in
// the same place.
void leave() {
  Thread* thread = machine.current;
  void* next = ready.empty() ? scheduler_stack : choose_next();
  if (machine.current != thread || next == scheduler_stack)
    emu_switch(&thread->stack_pointer, next);
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready.push_back(thread.index);
}

void release_barrier() {
  Block& block = machine.block;
  ++block.epoch;
  block.num_at_barrier = 0;
  for (int i = 0; i < machine.num_threads; ++i) {
    Thread& thread = machine.threads[i];
    if (thread.state != State::kAtBarrier) continue;
    make_ready(thread);
    if (thread.lane == 0) ++machine.warps[thread.warp].epoch;
  }
}

void finish_thread() {
  Thread& thread = *machine.current;
  Warp& warp = machine.warps[thread.warp];
  thread.state = State::kFinished;
  if (!thread.has_waited)
    report("dependent", nullptr, "thread %d ended without a wait", thread.index);
  warp.living &= ~(1u << thread.lane);
  Block& block = machine.block;
  --block.num_living;
  end_thread(thread.index);
  if (block.num_at_barrier > 0) {
    report("barrier", block.barrier_site, "thread %d ended while others wait at a barrier",
           thread.index);
    if (block.num_at_barrier == block.num_living) release_barrier();
  }
  leave();
  __builtin_unreachable();
}

void fiber_main() {
  kernel_body(kernel_context);
  finish_thread();
}

void prepare_stack(Thread& thread) {
  if (thread.stack_low == 0) {
    void* memory = reserve(kStackBytes + kGuardBytes);
    mprotect(memory, kGuardBytes, PROT_NONE);
    thread.stack_low = reinterpret_cast<uintptr_t>(memory) + kGuardBytes;
    thread.stack_high = thread.stack_low + kStackBytes;
  }
  // Stack tops are staggered, because otherwise all stacks would share a few cache sets.
  auto* top = reinterpret_cast<uint64_t*>(thread.stack_high - 64 - 128 * (thread.index % 32));
  *--top = 0;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  thread.stack_pointer = top;
}

void report_deadlock() {
  int num_waiting = 0;
  const void* site = nullptr;
  for (int i = 0; i < machine.num_threads; ++i) {
    if (machine.threads[i].state == State::kFinished) continue;
    ++num_waiting;
    site = machine.threads[i].site;
  }
  report("deadlock", site, "%d threads wait for ever", num_waiting);
}

dim3 unflatten(uint64_t i, dim3 size) {
  return dim3(unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y));
}

void run_block(dim3 index) {
  Block& block = machine.block;
  block = {index, block.run + 1, 1, machine.num_threads, 0, nullptr};
  ready.clear();
  for (int i = 0; i < machine.num_threads; ++i) {
    Thread& thread = machine.threads[i];
    thread.index = uint16_t(i);
    thread.warp = uint8_t(i / kWarpSize);
    thread.lane = uint8_t(i % kWarpSize);
    thread.position = unflatten(uint64_t(i), machine.block_size);
    thread.has_waited = !machine.is_dependent;
    if (thread.lane == 0) {
      const int lanes = std::min(kWarpSize, machine.num_threads - i);
      machine.warps[thread.warp] = {lanes == 32 ? 0xffffffffu : (1u << lanes) - 1, 0, 0, nullptr,
                                    1};
    }
    prepare_stack(thread);
    make_ready(thread);
  }
  begin_block();
  emu_switch(&scheduler_stack, choose_next());
  machine.current = nullptr;
  if (block.num_living > 0) {
    report_deadlock();
    machine.is_aborted = true;
    for (int i = 0; i < machine.num_threads; ++i) end_thread(i);
  }
}

}  // namespace

void release_stacks() {
  for (Thread& thread : machine.threads) {
    if (thread.stack_low == 0) continue;
    munmap(reinterpret_cast<void*>(thread.stack_low - kGuardBytes), kStackBytes + kGuardBytes);
    thread.stack_low = thread.stack_high = 0;
  }
}

uint32_t next_random(uint64_t limit) {  // splitmix64, then a product: a division would cost as much
  uint64_t x = random_state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return uint32_t(((x ^ x >> 31) >> 32) * limit >> 32);
}

extern "C" __attribute__((visibility("default"))) void emu_seed(uint64_t seed) {
  random_state = seed;
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  const uint64_t num_threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (num_threads == 0 || num_threads > kMaxThreads || num_blocks == 0 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > (227 << 10)) {
    report("launch", reinterpret_cast<const void*>(body),
           "%llu threads, %llu blocks, %zu bytes of shared memory", (unsigned long long)num_threads,
           (unsigned long long)num_blocks, shared_bytes);
    machine.is_dependent = false;
    return cudaErrorInvalidValue;
  }
  machine.grid_size = grid;
  machine.block_size = block;
  machine.num_threads = int(num_threads);
  machine.first_run = machine.block.run + 1;
  machine.is_aborted = false;
  kernel_body = body;
  kernel_context = context;
  begin_launch(shared_bytes);
  std::vector<uint64_t> order(num_blocks);
  for (uint64_t i = 0; i < num_blocks; ++i) order[i] = i;
  for (uint64_t i = num_blocks; i > 1; --i) std::swap(order[i - 1], order[next_random(i)]);
  for (uint64_t i = 0; i < num_blocks && !machine.is_aborted; ++i)
    run_block(unflatten(order[i], grid));
  machine.is_dependent = false;
  return cudaSuccess;
}

void make_next_dependent() { machine.is_dependent = true; }
void wait_for_previous_kernel() { machine.current->has_waited = true; }

dim3 thread_index() { return machine.current->position; }
dim3 block_index() { return machine.block.index; }
dim3 block_size() { return machine.block_size; }
dim3 grid_size() { return machine.grid_size; }

void sync_threads() {
  Thread& thread = *machine.current;
  Block& block = machine.block;
  const void* site = __builtin_return_address(0);
  if (block.num_at_barrier > 0 && block.barrier_site != site) {
    report("barrier", site, "thread %d is at another barrier than others", thread.index);
  }
  if (block.num_living < machine.num_threads) {
    report("barrier", site, "%d threads ended before a barrier",
           machine.num_threads - block.num_living);
  }
  block.barrier_site = thread.site = site;
  thread.state = State::kAtBarrier;
  if (++block.num_at_barrier == block.num_living) release_barrier();
  leave();
}

void collective(uint32_t mask, Compute compute, void* argument, const void* site) {
  Thread& thread = *machine.current;
  Warp& warp = machine.warps[thread.warp];
  if ((mask >> thread.lane & 1) == 0) {
    report("mask", site, "lane %d is not in its own mask %08x", thread.lane, mask);
    return;
  }
  if ((mask & ~warp.living) != 0) {
    report("mask", site, "the mask %08x names lanes that have ended", mask);
    mask &= warp.living;
  }
  if (warp.arrived != 0 && (warp.mask != mask || warp.compute != compute)) {
    report("mask", site, "lanes of a warp are at different operations");
    return;
  }
  warp.mask = mask;
  warp.compute = compute;
  warp.arrived |= 1u << thread.lane;
  thread.argument = argument;
  thread.site = site;
  thread.state = State::kInCollective;
  if (warp.arrived == mask) {
    void* arguments[kWarpSize] = {};
    Thread* first = &machine.threads[thread.warp * kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) arguments[lane] = first[lane].argument;
    }
    compute(arguments, mask);
    warp.arrived = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) make_ready(first[lane]);
    }
  }
  leave();
}

void sync_warp(uint32_t mask) {
  const auto compute = [](void* const*, uint32_t mask) {
    Warp& warp = machine.warps[machine.current->warp];
    if (mask == warp.living) ++warp.epoch;
  };
  collective(mask, compute, nullptr, __builtin_return_address(0));
}

namespace {

struct ShuffleArgument {
  uint64_t bits;
  int source;
  uint64_t result;
};

void compute_shuffle(void* const* arguments, uint32_t mask) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto* argument = static_cast<ShuffleArgument*>(arguments[lane]);
    if (argument->source < 0 || argument->source >= kWarpSize || !(mask >> argument->source & 1)) {
      report("mask", machine.current->site, "lane %d reads lane %d, which takes no part", lane,
             argument->source);
      argument->result = ~uint64_t{0};
    } else {
      argument->result = static_cast<ShuffleArgument*>(arguments[argument->source])->bits;
    }
  }
}

struct BallotArgument {
  bool predicate;
  uint32_t result;
};

void compute_ballot(void* const* arguments, uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) && static_cast<BallotArgument*>(arguments[lane])->predicate)
      votes |= 1u << lane;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) static_cast<BallotArgument*>(arguments[lane])->result = votes;
  }
}

}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t bits, Shuffle kind, int operand) {
  const int lane = machine.current->lane;
  int source = operand;
  if (kind == Shuffle::kXor) source = lane ^ operand;
  if (kind == Shuffle::kDown) source = lane + operand < kWarpSize ? lane + operand : lane;
  if (kind == Shuffle::kUp) source = lane - operand >= 0 ? lane - operand : lane;
  ShuffleArgument argument = {bits, source, 0};
  collective(mask, compute_shuffle, &argument, __builtin_return_address(0));
  return argument.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  BallotArgument argument = {predicate, 0};
  collective(mask, compute_ballot, &argument, __builtin_return_address(0));
  return argument.result;
}

}  // namespace emu
