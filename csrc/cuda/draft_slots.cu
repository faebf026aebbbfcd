// Lets `sample` sample after drafts: before it, copies of slots that go on as if the drafts had
// been sampled; after it, the slots move on by the drafts that were. `sample` itself knows no
// drafts.
#include "kernels.h"
#include "sample_filter.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxParts = 16;   // blocks that share a slot's counts
constexpr int kMinPart = 1024;  // of them, for a block
constexpr int kChainThreads = 64;

// Returns whether a sequence uses the spare slot, as its `ahead`-th draft.
__device__ __forceinline__ bool is_used(const DraftSlotsParams& p, int64_t spare) {
  return p.slots[spare] >= 0 && p.slots[spare] < p.num_slots && p.ahead[spare] >= 1 &&
         p.ahead[spare] <= spare + 1;
}

template <typename Value>
__device__ __forceinline__ void copy_list(Value* lists, int64_t stride, int64_t to, int64_t from,
                                          int32_t count) {
  const int64_t most = min(int64_t{count}, stride);
  for (int64_t i = threadIdx.x; i < most; i += kThreads)
    lists[to * stride + i] = lists[from * stride + i];
}

__global__ void __launch_bounds__(kThreads, 4) draft_slots_kernel(DraftSlotsParams p) {
  const int64_t spare = blockIdx.y;
  if (!is_used(p, spare)) return;
  const int64_t slot = p.slots[spare], copy = p.num_slots + spare;
  const int32_t ahead = p.ahead[spare];
  const SampleSlot& record = p.records[slot];
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) {
      SampleSlot next = record;
      next.position += ahead;
      next.last_id = -1;  // which stays if nothing can be sampled
      p.records[copy] = next;
    }
    copy_list(p.biased_ids, p.biased_stride, copy, slot, record.num_biased);
    copy_list(p.biased_values, p.biased_stride, copy, slot, record.num_biased);
    copy_list(p.masked_ids, p.masked_stride, copy, slot, record.num_masked);
  }
  if (!has_penalties(record)) return;
  const int vocab = int(p.vocab), length = ceil_divide(vocab, int(gridDim.x));
  const int first = int(blockIdx.x) * length, end = min(first + length, vocab);
  const int32_t* const own = p.counts + slot * p.vocab;
  int32_t* const counts = p.counts + copy * p.vocab;
  for (int i = first + int(threadIdx.x); i < end; i += kThreads) counts[i] = own[i];
  __syncthreads();
  for (int i = int(threadIdx.x); i < ahead; i += kThreads) {
    const int32_t id = p.drafts[spare - i];
    if (id >= first && id < end) atomicAdd(&counts[id], 2);
  }
}

// One thread for each sequence with drafts.
__global__ void __launch_bounds__(kChainThreads) accept_drafts_kernel(DraftSlotsParams p) {
  for (int64_t head = threadIdx.x; head < p.num_spares; head += kChainThreads) {
    if (!is_used(p, head) || p.ahead[head] != 1) continue;
    const int64_t slot = p.slots[head];
    SampleSlot& record = p.records[slot];
    for (int64_t spare = head; spare < p.num_spares; ++spare) {
      if (p.slots[spare] != slot || p.ahead[spare] != spare - head + 1) break;
      const SampleSlot& next = p.records[p.num_slots + spare];
      // If the slot itself, or the copy, could not sample, their positions do not follow.
      if (record.last_id != p.drafts[spare] || next.position != record.position + 1) break;
      if (next.last_id < 0 || next.last_id >= p.vocab) break;
      record.last_id = next.last_id;
      record.position = next.position;
      if (has_penalties(record)) p.counts[slot * p.vocab + next.last_id] += 2;
    }
  }
}

}  // namespace

cudaError_t draft_slots(const DraftSlotsParams& p, cudaStream_t stream) {
  if (p.vocab < 1 || p.vocab > (1 << 30) || p.num_spares > 65535) return cudaErrorInvalidValue;
  if (p.num_spares == 0) return cudaSuccess;
  const int64_t parts = min(int64_t{kMaxParts}, ceil_divide(p.vocab, int64_t{kMinPart}));
  const dim3 grid(unsigned(parts), unsigned(p.num_spares));
  return launch(draft_slots_kernel, grid, dim3(kThreads), 0, stream, p);
}

cudaError_t accept_drafts(const DraftSlotsParams& p, cudaStream_t stream) {
  if (p.num_spares == 0) return cudaSuccess;
  return launch(accept_drafts_kernel, dim3(1), dim3(kChainThreads), 0, stream, p);
}

}  // namespace tgi::cuda
