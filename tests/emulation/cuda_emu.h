// CUDA for g++: csrc/cuda/*.cuh include this header instead of the CUDA headers, so that kernels
// run on a CPU.
//
// Threads of a block are fibers, blocks run one after another in random order, and every load and
// store of a kernel is checked: kernels are compiled with -fsanitize=thread, and memory.cpp defines
// the hooks that the compiler then calls. Templates here are marked TGI_EMULATOR, so that the
// emulator's own accesses are not checked.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define TGI_EMULATOR __attribute__((no_sanitize("thread"), no_sanitize("undefined"), noinline))

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__
#define __launch_bounds__(...)

using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emu {

// Indices of the calling fiber. "const", because they do not change while a kernel runs.
dim3 thread_index() __attribute__((const));
dim3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));

// Runs body(context) once per thread of the grid. Returns cudaErrorInvalidValue if CUDA would
// refuse the launch.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

// Applies to the next launch: before its wait a thread may only read constant memory, and every
// thread must wait.
void make_next_dependent();
void wait_for_previous_kernel();

// Returns this launch's memory for a shared array; `key` identifies the array.
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

enum class Shuffle { kIndex, kXor, kDown, kUp };
uint64_t shuffle(uint32_t mask, uint64_t bits, Shuffle kind, int operand);
uint32_t ballot(uint32_t mask, bool predicate);
void sync_warp(uint32_t mask);
void sync_threads();

enum class Element { kBfloat16, kFloat16 };
void mma_m16n8k16(Element element, float* d, const uint32_t* a, const uint32_t* b);
void load_matrix_x4(uint32_t* out, const void* row, bool is_transposed);

void async_copy16(void* shared, const void* global, bool is_valid);
void async_commit();
void async_wait(int num_pending);

// Declares an atomic access of `size` bytes before it happens.
void atomic_access(void* address, int size);

template <typename T>
TGI_EMULATOR uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
TGI_EMULATOR T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T, typename Function>
TGI_EMULATOR T atomic(T* address, Function function) {
  atomic_access(address, sizeof(T));
  const T old = *address;
  *address = function(old);
  return old;
}

}  // namespace emu

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define blockDim (::emu::block_size())
#define gridDim (::emu::grid_size())

__forceinline__ void __syncthreads() { emu::sync_threads(); }
__forceinline__ void __syncwarp(uint32_t mask = 0xffffffffu) { emu::sync_warp(mask); }
template <typename T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int lane) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(value), emu::Shuffle::kIndex, lane));
}
template <typename T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(value), emu::Shuffle::kXor, lanes));
}
template <typename T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T value, int lanes) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(value), emu::Shuffle::kDown, lanes));
}
template <typename T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, int lanes) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(value), emu::Shuffle::kUp, lanes));
}
__forceinline__ uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return emu::ballot(mask, predicate);
}
template <typename T>
__forceinline__ T atomicAdd(T* address, T value) {
  return emu::atomic(address, [=](T old) { return T(old + value); });
}
template <typename T>
__forceinline__ T atomicMax(T* address, T value) {
  return emu::atomic(address, [=](T old) { return std::max(old, value); });
}

template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
__forceinline__ uint32_t __float_as_uint(float x) { return uint32_t(emu::to_bits(x)); }
__forceinline__ float __uint_as_float(uint32_t x) { return emu::from_bits<float>(x); }
__forceinline__ uint32_t __umulhi(uint32_t a, uint32_t b) {
  return uint32_t(uint64_t(a) * b >> 32);
}
__forceinline__ int __popc(uint32_t x) { return __builtin_popcount(x); }
__forceinline__ int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
__forceinline__ int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define SHARED_ARRAY(T, name, count) \
  static char name##_key;            \
  auto& name = *static_cast<T(*)[count]>(::emu::shared_array(&name##_key, sizeof(T) * (count)))
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::emu::dynamic_shared())
