// Reductions over a warp and a block, in an order that depends only on the number of threads.
#pragma once

#include "launch.cuh"

namespace tgi::cuda {

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Returns the result to all lanes.
template <typename T, typename Operation>
__device__ __forceinline__ T warp_reduce(T x, Operation operation) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    x = operation(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

// Returns the result to all threads. scratch: [warps of the block] in shared memory, free again on
// return. Every thread of a block of whole warps must call it.
template <typename T, typename Operation>
__device__ __forceinline__ T block_reduce(T x, Operation operation, T* scratch) {
  const int num_warps = int(blockDim.x) / kWarpSize;
  x = warp_reduce(x, operation);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  // By all warps alike: a loop over sixteen warps' results took 500 cycles, these shuffles take
  // 150.
  const int lane = int(threadIdx.x) % kWarpSize;
  T result = scratch[lane < num_warps ? lane : 0];
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_down_sync(kAllLanes, result, lanes);
    if (lane + lanes < num_warps) result = operation(result, other);
  }
  result = __shfl_sync(kAllLanes, result, 0);
  __syncthreads();
  return result;
}

}  // namespace tgi::cuda
