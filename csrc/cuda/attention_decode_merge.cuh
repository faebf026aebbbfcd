// The second kernel of decode attention: merges the chunks of each sequence's context, in order.
#pragma once

#include "attention_context.cuh"
#include "attention_tile.cuh"
#include "reduce.cuh"

namespace tgi::cuda {

// A warp has a head of a sequence, and a lane four of its dimensions, or of every 128. With a block
// per head, whose warps shared the chunks, 64 sequences of eight chunks took three times the
// instructions.
template <int HeadDim>
struct Merge {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kColumns = HeadDim / 4;
  static constexpr int kRuns = (kColumns + kWarpSize - 1) / kWarpSize;
  // Chunks that are loaded at once: those of 2,048 tokens are one latency.
  static constexpr int kLoads = 16;
};

template <typename Element, int HeadDim>
__global__ void __launch_bounds__(Merge<HeadDim>::kThreads) merge_kernel(AttentionParams p) {
  using M = Merge<HeadDim>;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t place = int64_t{blockIdx.x} * M::kWarps + threadIdx.x / kWarpSize;
  if (place >= p.num_sequences * p.num_heads) return;
  const int64_t sequence = divide_narrow(place, p.num_heads), head = place - sequence * p.num_heads;
  const Workspace workspace(p);
  const int first = p.plan[sequence], stop = p.plan[sequence + 1];
  float4 out[M::kRuns] = {};
  float max = -INFINITY, sum = 0;
#pragma unroll 1
  for (int chunk = first; chunk < stop; chunk += M::kLoads) {
    const int64_t from = int64_t{chunk} * p.num_heads + head;
    const int count = stop - chunk;
    float2 stats = {-INFINITY, 0};  // lane i: of the i-th chunk
    if (lane < min(count, M::kLoads)) stats = workspace.stats[from + lane * p.num_heads];
    float4 parts[M::kRuns][M::kLoads];
#pragma unroll
    for (int run = 0; run < M::kRuns; ++run) {
      const int column = run * kWarpSize + lane;
#pragma unroll
      for (int i = 0; i < M::kLoads; ++i) {
        parts[run][i] = float4{0, 0, 0, 0};
        if (i >= count || column >= M::kColumns) continue;
        parts[run][i] = *reinterpret_cast<const float4*>(
            workspace.out + (from + i * p.num_heads) * HeadDim + 4 * column);
      }
    }
    const float largest = fmaxf(max, warp_reduce(stats.x, Max()));
    const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing is visible yet
    const float own = exp2_flushed(max - shift), weight = exp2_flushed(stats.x - shift);
    sum = sum * own + warp_reduce(stats.y * weight, Add());
    max = largest;
#pragma unroll
    for (int run = 0; run < M::kRuns; ++run) {
      float4& total = out[run];
      total.x *= own, total.y *= own, total.z *= own, total.w *= own;
#pragma unroll
      for (int i = 0; i < M::kLoads; ++i) {
        const float4& part = parts[run][i];
        const float factor = __shfl_sync(kAllLanes, weight, i);
        total.x += part.x * factor, total.y += part.y * factor;
        total.z += part.z * factor, total.w += part.w * factor;
      }
    }
  }
  const float factor = first == stop ? 0.0f : inverse_sum(p, head, max, sum);
#pragma unroll
  for (int run = 0; run < M::kRuns; ++run) {
    const int column = run * kWarpSize + lane;
    if (column >= M::kColumns) continue;
    Element* to = static_cast<Element*>(p.out) + place * HeadDim + 4 * column;
    *reinterpret_cast<uint2*>(to) =
        uint2{Pair<Element>::pack(out[run].x * factor, out[run].y * factor),
              Pair<Element>::pack(out[run].z * factor, out[run].w * factor)};
  }
}

}  // namespace tgi::cuda
