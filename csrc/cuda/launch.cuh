// Launching kernels and declaring shared memory: the one place that knows how CUDA does it. g++
// compiles the same kernels for a CPU with the emulator's header instead.
//
// What `launch_dependent` starts may begin while the kernel before it still runs ("programmatic
// dependent launch", sm_90 and later; off until `set_dependent_launches`). Each of its threads
// calls `wait_for_kernel_before` before it ends, or touches anything but memory that no kernel
// writes: weights. Then `start_kernel_after` lets the next kernel begin.
//
// Why that is as safe as one kernel after the other. The wait returns when all blocks of the kernel
// before have ended and what they wrote is visible. That kernel had itself waited in each thread,
// so the one before it had ended too, and so on: after the wait no earlier kernel runs. So whatever
// is read is there, and whatever is written over nobody reads any more. A kernel started by
// `launch` begins when all before it have ended; so does a library's, or it keeps the same rule.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstdint>

#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char tgi_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(tgi_dynamic_shared)

namespace tgi::cuda {

extern bool allows_dependent_launches;  // launch.cu

// Starts a kernel and returns the launch's own error.
template <typename... Parameters>
cudaError_t launch_as(bool is_dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, cudaStream_t stream, Parameters... arguments) {
  if (shared_bytes > (48 << 10)) {  // more has to be asked for
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_dependent ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  cudaGetLastError();  // whoever checks next is not to find it again
  return error;
}

// Whether the code that the device runs has griddepcontrol. Not so, on any device, what is compiled
// there from PTX of an older architecture.
template <typename... Parameters>
bool has_wait(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  return launch_as<Parameters...>(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  return launch_as<Parameters...>(allows_dependent_launches && has_wait(kernel), kernel, grid,
                                  block, shared_bytes, stream, arguments...);
}

__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void start_kernel_after() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Of the current device; persistent kernels fill it a fixed number of times.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
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

// The emulator holds such a kernel to its waiting whether or not the switch is on.
template <typename... Parameters, typename... Arguments>
TGI_EMULATOR cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                          size_t shared_bytes, cudaStream_t stream,
                                          Arguments... arguments) {
  emu::make_next_dependent();
  return launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

__forceinline__ void wait_for_kernel_before() { emu::wait_for_kernel_before(); }
__forceinline__ void start_kernel_after() {}

inline int num_multiprocessors() { return 3; }

}  // namespace tgi::cuda

#endif

namespace tgi::cuda {

constexpr int kWarpSize = 32;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_divide(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// a / b of numbers below 2^32: of 64 bits a division is a function, which is called.
__host__ __device__ constexpr int64_t divide_narrow(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

}  // namespace tgi::cuda
