// The second kernel of decode attention: merges the chunks of each sequence's context.
#pragma once

#include "attention_context.cuh"
#include "attention_tile.cuh"

namespace tgi::cuda {

// Combines the partial results of a softmax over parts of the keys, in order.
struct Merged {
  float4 out = {0, 0, 0, 0};
  float max = -INFINITY, sum = 0;

  __device__ __forceinline__ void add(float4 part, float2 stats) {
    const float larger = fmaxf(max, stats.x);
    if (larger == -INFINITY) return;
    const float own = exp2_flushed(max - larger), other = exp2_flushed(stats.x - larger);
    out.x = out.x * own + part.x * other, out.y = out.y * own + part.y * other;
    out.z = out.z * own + part.z * other, out.w = out.w * own + part.w * other;
    sum = sum * own + stats.y * other;
    max = larger;
  }
};

constexpr int kMergeLoads = 8;  // in flight per thread: 32 chunks of 128 dimensions are one latency

// One block per (sequence, head): its parts merge every kParts-th chunk, then the first part merges
// those and divides. Threads have four head dimensions each.
template <int HeadDim>
struct Merge {
  static constexpr int kColumns = HeadDim / 4;
  static constexpr int kParts = 128 / kColumns;
  static constexpr int kThreads = kParts * kColumns;
};

template <typename Element, int HeadDim>
__global__ void __launch_bounds__(Merge<HeadDim>::kThreads) merge_kernel(AttentionParams p) {
  constexpr int kColumns = Merge<HeadDim>::kColumns, kParts = Merge<HeadDim>::kParts;
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(float4, outs, kParts * kColumns);
  SHARED_ARRAY(float2, stats, kParts);
  const Workspace workspace(p);
  const int64_t sequence = divide_narrow(blockIdx.x, p.num_heads),
                head = blockIdx.x - sequence * p.num_heads;
  const int64_t first = p.plan[sequence], stop = p.plan[sequence + 1];
  const int part = int(threadIdx.x) / kColumns, column = int(threadIdx.x) % kColumns;
  Merged merged;
  for (int64_t chunk = first + part; chunk < stop; chunk += kMergeLoads * kParts) {
    float4 chunk_out[kMergeLoads];
    float2 chunk_stats[kMergeLoads];
#pragma unroll
    for (int i = 0; i < kMergeLoads; ++i) {
      const int64_t place = (chunk + i * kParts) * p.num_heads + head;
      const bool exists = chunk + i * kParts < stop;
      chunk_stats[i] = exists ? workspace.stats[place] : float2{-INFINITY, 0};
      chunk_out[i] =
          exists ? *reinterpret_cast<const float4*>(workspace.out + place * HeadDim + 4 * column)
                 : float4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kMergeLoads; ++i) merged.add(chunk_out[i], chunk_stats[i]);
  }
  outs[part * kColumns + column] = merged.out;
  if (column == 0) stats[part] = float2{merged.max, merged.sum};
  __syncthreads();  // the parts are there
  if (part > 0) return;
  for (int i = 1; i < kParts; ++i) merged.add(outs[i * kColumns + column], stats[i]);
  const float factor = first == stop ? 0.0f : inverse_sum(p, head, merged.max, merged.sum);
  Element* out =
      static_cast<Element*>(p.out) + (sequence * p.num_heads + head) * HeadDim + 4 * column;
  *reinterpret_cast<uint2*>(out) =
      uint2{Pair<Element>::pack(merged.out.x * factor, merged.out.y * factor),
            Pair<Element>::pack(merged.out.z * factor, merged.out.w * factor)};
}

}  // namespace tgi::cuda
