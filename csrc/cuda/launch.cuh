// Launching kernels and declaring shared memory: the one place that knows how CUDA does it. g++
// compiles the same kernels for a CPU with the emulator's header instead.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstdint>

#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char tgi_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(tgi_dynamic_shared)

namespace tgi::cuda {

// Starts a kernel and returns the launch's own error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > (48 << 10)) {  // more has to be asked for
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
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

inline int num_multiprocessors() { return 3; }

}  // namespace tgi::cuda

#endif

namespace tgi::cuda {

constexpr int kWarpSize = 32;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_divide(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace tgi::cuda
