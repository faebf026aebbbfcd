// Asynchronous copies from global to shared memory, which overlap with arithmetic. A thread commits
// its copies in groups and waits for them by count; other threads see the data after a barrier that
// follows the wait.
#pragma once

#include "launch.cuh"

namespace tgi::cuda {

#ifdef __CUDACC__

// Copies 16 bytes, or writes zeros without reading; both addresses are multiples of 16.
__device__ __forceinline__ void async_copy16(void* shared, const void* global, bool is_valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(address),
               "l"(global), "r"(is_valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Returns when at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

#else

inline void async_copy16(void* shared, const void* global, bool is_valid) {
  emu::async_copy16(shared, global, is_valid);
}
inline void async_commit() { emu::async_commit(); }
template <int kPending>
inline void async_wait() {
  emu::async_wait(kPending);
}

#endif

}  // namespace tgi::cuda
