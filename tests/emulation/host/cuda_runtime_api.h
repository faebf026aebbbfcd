// What csrc/cuda/kernels.h and the bindings take from CUDA, for bindings that are compiled without
// it.
#pragma once

#include <cstddef>
#include <cstring>

using cudaError_t = int;
using cudaStream_t = void*;
using cudaEvent_t = int*;
using cudaGraphExec_t = void (*)();  // a graph is a function
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;

enum cudaMemcpyKind { cudaMemcpyDefault };
enum { cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t count, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(target, source, count);
  return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  if (graph == nullptr) return cudaErrorInvalidValue;
  graph();
  return cudaSuccess;
}

// An event counts how often it was recorded, and is always in the past.
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new int(0);
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  ++*event;
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
