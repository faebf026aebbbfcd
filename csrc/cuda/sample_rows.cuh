// Operations of one block on a row of vocab values, or on a part of it: extremes, cut-offs without
// a sort, log-probabilities. Sums are of integers (or over a whole row, in a fixed order), so a
// row's bits depend only on the row: not on its parts, nor on the order of a list.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>

#include "kernels.h"
#include "reduce.cuh"

namespace tgi::cuda {

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kBins = 2048;
constexpr int kListed = 2048;         // elements of one bin with which a search continues
constexpr float kBinsADistance = 64;  // the last bin holds everything further away than 32

struct Min {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

using Weight = unsigned long long;  // a count, or e^score in units of 2^-40

// The block's shared memory.
struct RowShared {
  // Weights in two words: shared memory has no 64-bit addition, only a compare-and-swap loop.
  uint32_t low[kBins];
  uint32_t high[kBins];
  int listed[kListed];        // the elements of the bin that was found
  int num_listed;             // may exceed the capacity
  Weight weights[kRowWarps];  // scratch for reductions, by type
  double doubles[kRowWarps];
  float floats[kRowWarps];
  int ints[kRowWarps];
  Weight before;  // in a search: the weight before the bin that was found
  int bin;
};

// The elements of a row that a block processes: `count` from `first` on, or those listed.
struct Elements {
  const float* x;  // [vocab], the row
  int first;
  int count;
  const int32_t* listed = nullptr;  // [count], in any order; null: no list

  __device__ __forceinline__ int id_of(int k) const {
    return listed == nullptr ? first + k : listed[k];
  }
};

// Returns the four elements from x on; -infinity for those from `count` on.
__device__ __forceinline__ float4 load_four(const float* x, int count, bool is_aligned) {
  if (is_aligned && count >= 4) return *reinterpret_cast<const float4*>(x);
  return float4{x[0], count > 1 ? x[1] : -INFINITY, count > 2 ? x[2] : -INFINITY,
                count > 3 ? x[3] : -INFINITY};
}

__device__ __forceinline__ bool is_aligned(const float* x) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Calls body(k, four) for this thread's runs of four elements, from the k-th on. Requests `Batch`
// of them at a time: one at a time, an SM has half of what it takes in flight.
template <int Batch, typename Body>
__device__ __forceinline__ void for_each_four(const float* x, int count, const Body& body) {
  constexpr int kStep = kRowThreads * 4;
  const bool aligned = is_aligned(x);
  int k = int(threadIdx.x) * 4;
  if (Batch > 1 && aligned) {
#pragma unroll 1
    for (; k + (Batch - 1) * kStep + 3 < count; k += Batch * kStep) {
      float4 four[Batch];
#pragma unroll
      for (int i = 0; i < Batch; ++i) four[i] = load_four(x + k + i * kStep, 4, true);
#pragma unroll
      for (int i = 0; i < Batch; ++i) body(k + i * kStep, four[i]);
    }
  }
#pragma unroll 1
  for (; k < count; k += Batch * kStep) {
    float4 four[Batch] = {};
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      const int rest = count - (k + i * kStep);
      if (rest > 0) four[i] = load_four(x + k + i * kStep, rest, aligned);
    }
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      if (k + i * kStep < count) body(k + i * kStep, four[i]);
    }
  }
}

// Calls body(i, x[i]) for this thread's share: runs of four by index, so that sums over a row do
// not depend on its address.
template <int Batch = 1, typename Body>
__device__ __forceinline__ void for_each(const Elements& e, const Body& body) {
  if (e.listed != nullptr) {
    for (int k = int(threadIdx.x); k < e.count; k += kRowThreads)
      body(e.listed[k], e.x[e.listed[k]]);
    return;
  }
  for_each_four<Batch>(e.x + e.first, e.count, [&](int k, float4 four) {
    const int i = e.first + k;
    body(i, four.x);
    if (k + 1 < e.count) body(i + 1, four.y);
    if (k + 2 < e.count) body(i + 2, four.z);
    if (k + 3 < e.count) body(i + 3, four.w);
  });
}

struct Stats {
  float max;
  int first;       // element of this value
  bool is_finite;  // all values: neither NaN nor +infinity
};

// Returns the stats of these elements, which are not a list, and sets the maximum of the thread's.
__device__ __forceinline__ Stats find_stats(const Elements& e, float& largest, RowShared& shared) {
  const float* x = e.x + e.first;
  largest = -INFINITY;
  int best = 0, is_finite = 1;
  for_each_four<4>(x, e.count, [&](int k, float4 four) {
    const bool are_finite =
        four.x <= FLT_MAX && four.y <= FLT_MAX && four.z <= FLT_MAX && four.w <= FLT_MAX;
    if (!are_finite) is_finite = 0;
    const float most = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
    if (most > largest) {
      largest = most;
      best = k;
    }
  });
  const float max = block_reduce(largest, Max(), shared.floats);
  int first = INT_MAX;
  if (largest == max && max > -INFINITY) {
    while (x[best] != max) ++best;  // within the run of four
    first = e.first + best;
  }
  first = block_reduce(first, Min(), shared.ints);
  return {max, first, block_reduce(is_finite, Min(), shared.ints) != 0};
}

__device__ __forceinline__ void clear_bins(RowShared& shared) {
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) {
    shared.low[bin] = 0;
    shared.high[bin] = 0;
  }
}

__device__ __forceinline__ void add_to_bin(RowShared& shared, int bin, Weight weight) {
  const auto low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&shared.low[bin], low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&shared.high[bin], high);
}

__device__ __forceinline__ Weight weight_of_bin(const RowShared& shared, int bin) {
  return Weight{shared.high[bin]} << 32 | shared.low[bin];
}

// Finds the first bin at which the weights up to it reach target (at most their total) and sets
// shared.bin and shared.before, the weight before it. Each thread processes four adjacent bins.
__device__ __forceinline__ void find_bin(Weight target, RowShared& shared) {
  constexpr int kOwn = kBins / kRowThreads;
  const int thread = int(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  Weight own = 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) own += weight_of_bin(shared, thread * kOwn + k);
  Weight upto = own;  // over this warp's threads
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const Weight other = __shfl_up_sync(kAllLanes, upto, lanes);
    if (lane >= lanes) upto += other;
  }
  if (lane == kWarpSize - 1) shared.weights[warp] = upto;
  __syncthreads();
  upto += warp_reduce(lane < warp ? shared.weights[lane] : Weight{0}, Add());
  Weight before = upto - own;
  if (before < target && target <= upto) {
    int bin = thread * kOwn;
    while (before + weight_of_bin(shared, bin) < target) before += weight_of_bin(shared, bin++);
    shared.bin = bin;
    shared.before = before;
  }
  __syncthreads();
}

// Returns the bin of a distance in the first pass: linear, because logits are dense near the
// middle, where binning by float bits would put a fifth of a vocabulary into one bin.
__device__ __forceinline__ int linear_bin(float distance) {
  return int(fminf(distance * kBinsADistance, float(kBins - 1)));
}

// Returns the least distance at which the weight of all elements up to it reaches share(total);
// both inclusive. weigh(x, distance) returns an element's weight and sets its distance >= 0, or
// returns 0. `total` is the row's weight if `e` omits elements beyond the cut-off; 0 if `e` is
// complete.
//
//     n elements -> linear bins -> the bin of the target, its elements listed -> by their bits
//
// The list is searched by radix from the top bits of the distance, whose order equals that of its
// bits. If the list overflows, all elements are searched instead, skipping those of other bins.
template <typename Weigh, typename Share>
__device__ __forceinline__ float find_cutoff(const Elements& e, Weight total, const Weigh& weigh,
                                             const Share& share, RowShared& shared) {
  clear_bins(shared);
  if (threadIdx.x == 0) shared.num_listed = 0;
  __syncthreads();
  Weight own = 0;
  for_each(e, [&](int, float x) {
    float distance = 0;
    const Weight weight = weigh(x, distance);
    if (weight == 0) return;
    add_to_bin(shared, linear_bin(distance), weight);
    own += weight;
  });
  own = block_reduce(own, Add(), shared.weights);  // its barriers also end the additions
  if (total == 0) total = own;
  if (total == 0) return INFINITY;
  Weight target = min(max(share(total), Weight{1}), total);
  find_bin(target, shared);
  target -= shared.before;
  const int linear = shared.bin;
  for_each(e, [&](int i, float x) {
    float distance = 0;
    if (weigh(x, distance) == 0 || linear_bin(distance) != linear) return;
    const int place = atomicAdd(&shared.num_listed, 1);
    if (place < kListed) shared.listed[place] = i;
  });
  __syncthreads();
  const bool is_listed = shared.num_listed <= kListed;
  const int count = is_listed ? shared.num_listed : e.count;
  constexpr int kShifts[4] = {31, 20, 9, 0};
  uint32_t prefix = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? kShifts[1] : pass == 1 ? kShifts[2] : kShifts[3];
    const int above = pass == 0 ? kShifts[0] : pass == 1 ? kShifts[1] : kShifts[2];
    clear_bins(shared);
    __syncthreads();
    for (int k = int(threadIdx.x); k < count; k += kRowThreads) {
      float distance = 0;
      const Weight weight = weigh(e.x[is_listed ? shared.listed[k] : e.id_of(k)], distance);
      const uint32_t bits = __float_as_uint(distance);
      if (weight == 0 || bits >> above != prefix >> above) continue;
      if (!is_listed && linear_bin(distance) != linear) continue;
      add_to_bin(shared, int(bits >> shift & ((1u << (above - shift)) - 1)), weight);
    }
    __syncthreads();
    find_bin(target, shared);
    target -= shared.before;
    prefix |= uint32_t(shared.bin) << shift;
  }
  return __uint_as_float(prefix);
}

__device__ __forceinline__ Weight to_weight(float score) {
  return static_cast<Weight>(expf(score) * 0x1p40f);
}

// Returns the logarithm of a sum of weights of e^score.
__device__ __forceinline__ float log_of(Weight total) {
  return static_cast<float>(log(double(total) * 0x1p-40));
}

// Computes log softmax of value(x[i]), where -infinity excludes an element, at `id` and for the
// `wanted` best, which `e` contains; returns the number of the latter. Lowest id first on ties.
template <typename Value>
__device__ __forceinline__ int describe(const Elements& e, const Value& value, float normaliser,
                                        int id, int wanted, float* logprob, int32_t* top_ids,
                                        float* top_logprobs, RowShared& shared) {
  const float own = value(e.x[id]);
  if (threadIdx.x == 0) *logprob = own == -INFINITY ? -INFINITY : own - normaliser;
  float last = INFINITY;  // value and id listed last
  int last_id = -1, filled = 0;
  for (; filled < wanted; ++filled) {
    float best = -INFINITY;
    int best_id = INT_MAX;
    for_each(e, [&](int i, float raw) {
      const float x = value(raw);
      const bool is_after = x < last || (x == last && i > last_id);
      if (is_after && (x > best || (x == best && i < best_id))) {
        best = x;
        best_id = i;
      }
    });
    const float largest = block_reduce(best, Max(), shared.floats);
    if (largest == -INFINITY) break;
    last_id = block_reduce(best == largest ? best_id : INT_MAX, Min(), shared.ints);
    last = largest;
    if (threadIdx.x == 0) {
      top_ids[filled] = last_id;
      top_logprobs[filled] = last - normaliser;
    }
  }
  return filled;
}

}  // namespace tgi::cuda
