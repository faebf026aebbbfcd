// What launches share: the switch for dependent ones, and what is known of each kernel.
#include <unordered_map>

#include "dependent_launch.h"
#include "launch.cuh"

namespace tgi::cuda {
namespace {

bool allows_dependent_launches = false;
thread_local bool follows_library = false;

}  // namespace

void set_dependent_launches(bool is_on) { allows_dependent_launches = is_on; }

void follow_library() { follows_library = true; }

#ifdef __CUDACC__

bool takes_dependent_launch() {
  const bool is_early = allows_dependent_launches && !follows_library;
  follows_library = false;
  return is_early;
}

KernelTraits traits_of(const void* kernel, size_t shared_bytes) {
  struct Known {
    size_t shared_bytes;
    KernelTraits traits;
  };
  // A thread uses one device, which no other thread of the process uses: another limit would lower
  // this one's. Asking takes the driver a microsecond, for each of hundreds of launches in a step.
  thread_local std::unordered_map<const void*, Known> known;
  const auto [found, is_new] = known.try_emplace(kernel, Known{48 << 10, {cudaSuccess, false}});
  Known& of = found->second;
  if (is_new) {
    cudaFuncAttributes attributes;
    of.traits.has_wait =
        cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }
  if (shared_bytes > of.shared_bytes) {  // more than the usual limit must be requested
    of.traits.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
    of.shared_bytes = shared_bytes;
  }
  return of.traits;
}

int num_multiprocessors() {
  thread_local int count = 0;
  int device = 0;
  if (count > 0) return count;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

int num_resident_blocks(size_t shared_bytes, int most) {
  int device = 0, available = 0, reserved = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  const int fitting = available / (int(shared_bytes) + reserved);
  return num_multiprocessors() * (fitting < 1 ? 1 : fitting < most ? fitting : most);
}

int shared_bytes_of_block(int blocks) {
  thread_local int available = 0, reserved = 0, most = 0;
  int device = 0;
  if (available == 0 && cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  const int share = available / blocks - reserved;
  return share < 0 ? 0 : share < most ? share : most;
}

#endif

}  // namespace tgi::cuda
