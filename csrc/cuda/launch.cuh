// Kernel launches and shared-memory declarations, the only code that depends on CUDA's syntax for
// them. With the emulator's header instead, g++ compiles the same kernels for a CPU.
//
// A kernel started by `launch_dependent` may begin while the previous one still runs ("programmatic
// dependent launch", sm_90 and later; off until `set_dependent_launches`). Each of its threads must
// call `wait_for_previous_kernel` before it ends or accesses any memory except weights, which no
// kernel writes. It calls `allow_next_kernel` first of all, so that a product two kernels on
// fetches its first weights while this one waits: the next kernel begins as soon as all blocks of
// this one have begun.
//
// This is as safe as running one kernel after another. The wait returns when all blocks of the
// previous kernel have ended and their writes are visible. Each thread of that kernel has itself
// waited, so the kernel before it had ended too, and so on: after the wait no earlier kernel is
// running. All inputs are therefore complete, and no other kernel still reads the memory that is
// overwritten. A kernel started by `launch` begins after all earlier ones have ended; a library's
// kernel does too, or follows the same rule.
//
// A kernel after a library's is not started early (`follow_library`): cuBLAS's products allow that
// as soon as they begin, and blocks that wait then take the place of theirs.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstdint>

#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char tgi_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(tgi_dynamic_shared)

namespace tgi::cuda {

// What a launch needs to know of a kernel, asked of the driver once per thread.
struct KernelTraits {
  cudaError_t error;  // of raising the limit of dynamic shared memory
  bool has_wait;      // Does the code that the device runs have griddepcontrol? PTX of an older
                      // architecture, compiled on the device, does not.
};
KernelTraits traits_of(const void* kernel, size_t shared_bytes);  // launch.cu

// Returns whether the next kernel of this thread may begin before the previous one has ended.
bool takes_dependent_launch();

// Returns the count for the current device; persistent kernels fill it a fixed number of times.
int num_multiprocessors();

// Returns how many blocks of a persistent kernel the current device holds, if registers allow
// `most` per multiprocessor.
int num_resident_blocks(size_t shared_bytes, int most);

// Returns the dynamic shared memory that each of `blocks` blocks of a multiprocessor can have.
int shared_bytes_of_block(int blocks);

// Starts a kernel and returns the launch's own error.
template <typename... Parameters>
cudaError_t launch_as(bool is_dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, cudaStream_t stream, Parameters... arguments) {
  const KernelTraits traits = traits_of(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (traits.error != cudaSuccess) return traits.error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_dependent && traits.has_wait ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  cudaGetLastError();  // clears the error, so that the next check does not report it again
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  return launch_as<Parameters...>(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  return launch_as<Parameters...>(takes_dependent_launch(), kernel, grid, block, shared_bytes,
                                  stream, arguments...);
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace tgi::cuda

#else

#include "cuda_emu.h"

namespace tgi::cuda {

template <typename... Parameters, typename... Arguments>
TGI_EMULATOR cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  auto body = [=]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
  using Body = decltype(body);
  return emu::run(
      grid, block, shared_bytes, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// The emulator enforces the wait of such a kernel whether or not the switch is on.
template <typename... Parameters, typename... Arguments>
TGI_EMULATOR cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                          size_t shared_bytes, cudaStream_t stream,
                                          Arguments... arguments) {
  emu::make_next_dependent();
  return launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

__forceinline__ void wait_for_previous_kernel() { emu::wait_for_previous_kernel(); }
__forceinline__ void allow_next_kernel() {}

inline int num_multiprocessors() { return 3; }
inline int num_resident_blocks(size_t, int) { return 3; }   // few, so that each has many items
inline int shared_bytes_of_block(int) { return 72 << 10; }  // little, for many passes

}  // namespace tgi::cuda

#endif

namespace tgi::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_divide(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Returns a / b for numbers below 2^32: a 64-bit division would be a function call.
__host__ __device__ constexpr int64_t divide_narrow(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

}  // namespace tgi::cuda
