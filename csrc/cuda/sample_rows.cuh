// What one block finds out about one row of vocab values: extremes, cut-offs without a sort,
// log-probabilities. Every sum is of integers or in a fixed order, so a row's bits hang on nothing
// but the row.
#pragma once

#include <cfloat>
#include <cmath>

#include "kernels.h"
#include "reduce.cuh"

namespace tgi::cuda {

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kBins = 2048;

struct Min {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

using Weight = unsigned long long;  // a count, or e^score in units of 2^-40

// The block's shared memory.
struct RowRoom {
  Weight bins[kBins];
  Weight weights[kRowWarps];  // scratch of reductions, by type
  double doubles[kRowWarps];
  float floats[kRowWarps];
  int ints[kRowWarps];
  Weight before;  // of a search: the weight before the bin found
  int bin;
};

struct RowStats {
  float max;
  bool is_finite;  // neither NaN nor +infinity
};

__device__ __forceinline__ RowStats row_stats(const float* x, int n, RowRoom& room) {
  float largest = -INFINITY;
  int is_finite = 1;
  for (int i = int(threadIdx.x); i < n; i += kRowThreads) {
    const float value = x[i];
    if (!(value <= FLT_MAX)) is_finite = 0;
    largest = fmaxf(largest, value);
  }
  largest = block_reduce(largest, Max(), room.floats);
  return {largest, block_reduce(is_finite, Min(), room.ints) != 0};
}

// The first index of x [n] with this value.
__device__ __forceinline__ int row_find(const float* x, int n, float value, RowRoom& room) {
  int first = n;
  for (int i = int(threadIdx.x); i < n && first == n; i += kRowThreads) {
    if (x[i] == value) first = i;
  }
  return block_reduce(first, Min(), room.ints);
}

// Of the bins' weights, the first bin at which those up to it reach target (at most their total):
// room.bin, and room.before, the weight before it. Each thread takes four neighbouring bins.
__device__ __forceinline__ void find_bin(Weight target, RowRoom& room) {
  constexpr int kOwn = kBins / kRowThreads;
  const int thread = int(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  Weight own = 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) own += room.bins[thread * kOwn + k];
  Weight upto = own;  // of this warp's threads
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const Weight other = __shfl_up_sync(0xffffffffu, upto, lanes);
    if (lane >= lanes) upto += other;
  }
  if (lane == kWarpSize - 1) room.weights[warp] = upto;
  __syncthreads();
  for (int other = 0; other < warp; ++other) upto += room.weights[other];
  Weight before = upto - own;
  if (before < target && target <= upto) {
    int bin = thread * kOwn;
    while (before + room.bins[bin] < target) before += room.bins[bin++];
    room.bin = bin;
    room.before = before;
  }
  __syncthreads();
}

// The least distance at which the weight of all elements up to it reaches share(total); both
// inclusive. weigh(i, distance) gives element i's weight and distance >= 0, or 0. Radix search from
// the top bits of the distance, whose order is that of its bits.
template <typename Weigh, typename Share>
__device__ __forceinline__ float reach(int n, const Weigh& weigh, const Share& share,
                                       RowRoom& room) {
  constexpr int kShifts[4] = {31, 20, 9, 0};
  uint32_t prefix = 0;
  Weight target = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? kShifts[1] : pass == 1 ? kShifts[2] : kShifts[3];
    const int above = pass == 0 ? kShifts[0] : pass == 1 ? kShifts[1] : kShifts[2];
    for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) room.bins[bin] = 0;
    __syncthreads();
    Weight total = 0;
    for (int i = int(threadIdx.x); i < n; i += kRowThreads) {
      float distance = 0;
      const Weight weight = weigh(i, distance);
      const uint32_t bits = __float_as_uint(distance);
      if (weight == 0 || bits >> above != prefix >> above) continue;
      atomicAdd(&room.bins[bits >> shift & ((1u << (above - shift)) - 1)], weight);
      total += weight;
    }
    total = block_reduce(total, Add(), room.weights);  // its barriers end the additions, too
    if (pass == 0) target = min(max(share(total), Weight{1}), total);
    if (total == 0) return INFINITY;
    find_bin(target, room);
    target -= room.before;
    prefix |= uint32_t(room.bin) << shift;
  }
  return __uint_as_float(prefix);
}

__device__ __forceinline__ Weight to_weight(float score) {
  return static_cast<Weight>(expf(score) * 0x1p40f);
}

// log softmax of value(i), where -infinity is out, at `id` and of the `wanted` best; returns how
// many of these there are. Lowest id first on ties.
template <typename Value>
__device__ __forceinline__ int describe(int n, const Value& value, float max, int id, int wanted,
                                        float* logprob, int32_t* top_ids, float* top_logprobs,
                                        RowRoom& room) {
  float sum = 0;
  for (int i = int(threadIdx.x); i < n; i += kRowThreads) sum += expf(value(i) - max);
  const auto normaliser = static_cast<float>(log(block_reduce(double(sum), Add(), room.doubles)));
  const float own = value(id);
  if (threadIdx.x == 0) *logprob = own == -INFINITY ? -INFINITY : (own - max) - normaliser;
  float last = INFINITY;  // value and id listed last
  int last_id = -1, filled = 0;
  for (; filled < wanted; ++filled) {
    float best = -INFINITY;
    int best_id = n;
    for (int i = int(threadIdx.x); i < n; i += kRowThreads) {
      const float x = value(i);
      if (x > best && (x < last || (x == last && i > last_id))) {
        best = x;
        best_id = i;
      }
    }
    const float largest = block_reduce(best, Max(), room.floats);
    if (largest == -INFINITY) break;
    last_id = block_reduce(best == largest ? best_id : n, Min(), room.ints);
    last = largest;
    if (threadIdx.x == 0) {
      top_ids[filled] = last_id;
      top_logprobs[filled] = (last - max) - normaliser;
    }
  }
  return filled;
}

}  // namespace tgi::cuda
