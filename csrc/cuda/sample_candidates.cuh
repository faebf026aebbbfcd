// The candidates of a row, found by the maxima of its groups: of the row's elements, only those of
// the groups that may have one are read. If they are few, one warp selects among them.
//
//     group_max -> the bin of the k-th -> groups up to it -> their elements up to it: the list
//     list -> its values in order, if few -> top-k, top-p, min-p -> race
#pragma once

#include "sample_parts.cuh"

namespace tgi::cuda {

constexpr int kCandidates = 2 * kBins;  // capacity of the list
constexpr int kFew = 256;               // candidates that are sorted by counting

struct Candidates {
  int32_t ids[kCandidates];
  int num;               // may exceed the capacity
  int num_groups;        // listed in RowShared::listed
  float values[kFew];    // of the first ids
  float sorted[kFew];    // the same in descending order
  int32_t places[kFew];  // in `ids`, of `sorted`
  float floor;           // of the scores that are kept
  int winner;
};

// A row's values and groups, in bins of the distance from its maximum.
struct Binned {
  const float* x;          // [vocab]
  const float* group_max;  // [kGroups]
  float max, factor;

  __device__ __forceinline__ int bin(float value) const {
    return linear_bin((max - value) * factor);
  }
};

// Returns a bin up to which there are `count` groups, so at least as many elements; the last bin if
// there are fewer.
__device__ __forceinline__ int bin_of_count(const Binned& row, const Split& split, int count,
                                            RowShared& shared) {
  clear_bins(shared);
  if (threadIdx.x == 0) shared.bin = kBins - 1;
  __syncthreads();
  const int num_groups = split.num_parts * split.groups_per_part();
#pragma unroll
  for (int k = 0; k < kGroups / kRowThreads; ++k) {
    const int group = int(threadIdx.x) + k * kRowThreads;
    const int bin = group < num_groups ? row.bin(row.group_max[group]) : kBins - 1;
    if (bin < kBins - 1) atomicAdd(&shared.low[bin], 1u);
  }
  __syncthreads();
  find_bin(Weight(count), shared);
  return shared.bin;
}

// Returns the bin in which the set ends that has `top_p` of the weight `total`; -1 if there is
// none.
__device__ __forceinline__ int bin_of_weight(const Histogram& histogram, Weight total, float top_p,
                                             RowShared& shared) {
  if (total == 0) return -1;
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) {
    const Weight weight = histogram.weights[bin];
    shared.low[bin] = static_cast<uint32_t>(weight);
    shared.high[bin] = static_cast<uint32_t>(weight >> 32);
  }
  __syncthreads();
  find_bin(min(max(share_of(total, top_p), Weight{1}), total), shared);
  return shared.bin;
}

// Lists the elements of the row up to bin `last` of their distance and returns them, or the whole
// row if there are too many.
__device__ __forceinline__ Elements list(const Binned& row, int n, const Split& split, int last,
                                         Candidates& candidates, RowShared& shared) {
  static_assert(kGroups <= kListed, "the groups are listed where elements are");
  const int groups_per_part = split.groups_per_part();
  const auto is_near = [&](float value) { return value > -INFINITY && row.bin(value) <= last; };
  if (threadIdx.x == 0) candidates.num = candidates.num_groups = 0;
  __syncthreads();
  for (int group = int(threadIdx.x); group < split.num_parts * groups_per_part;
       group += kRowThreads) {
    if (is_near(row.group_max[group])) {
      shared.listed[atomicAdd(&candidates.num_groups, 1)] = group;
    }
  }
  __syncthreads();
  // A group has `lanes` runs of four in every kRowThreads.
  const int length = part_of(row.x, n, 0, split.num_parts).count;
  const uint32_t runs = uint32_t(ceil_divide(length, kRowThreads * 4) * split.lanes);
  const uint32_t count = uint32_t(candidates.num_groups) * runs, lanes = uint32_t(split.lanes);
  const bool aligned = is_aligned(row.x);
  for (uint32_t k = threadIdx.x; k < count; k += kRowThreads) {
    const int group = shared.listed[k / runs];
    const int run = int(k % runs / lanes) * kRowThreads + group % groups_per_part * split.lanes +
                    int(k % runs % lanes);
    const Elements part = part_of(row.x, n, group / groups_per_part, split.num_parts);
    if (run * 4 >= part.count) continue;
    const int first = part.first + run * 4;
    const float4 four = load_four(row.x + first, part.count - run * 4, aligned);
    const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!is_near(values[i])) continue;
      const int place = atomicAdd(&candidates.num, 1);
      if (place < kCandidates) candidates.ids[place] = first + i;
      if (place < kFew) candidates.values[place] = values[i];
    }
  }
  __syncthreads();
  if (candidates.num > kCandidates) return {row.x, 0, n};
  return {row.x, 0, candidates.num, candidates.ids};
}

// Sorts at most kFew candidates: an element's place is the number of those before it.
__device__ __forceinline__ void sort_few(int count, Candidates& candidates) {
  const int own = int(threadIdx.x);
  if (own < count) {
    const float value = candidates.values[own];
    int place = 0;
#pragma unroll 4
    for (int other = 0; other < count; ++other) {
      const float its = candidates.values[other];
      place += its > value || (its == value && other < own) ? 1 : 0;
    }
    candidates.sorted[place] = value;
    candidates.places[place] = own;
  }
  __syncthreads();
}

// Does what narrow_filter does, on sorted candidates. One warp calls it.
__device__ __forceinline__ void narrow_few(const SampleSlot& slot, int count, Weight total, int n,
                                           const Candidates& candidates, ScoreFilter& filter) {
  const int lane = int(threadIdx.x) % kWarpSize;
  const auto weight_at = [&](int k, float& score) {
    score = k < count ? filter.score(candidates.sorted[k]) : -INFINITY;
    return score >= filter.floor ? to_weight(score) : Weight{0};
  };
  float score;
  if (has_top_k(slot, n)) {
    const float kth = filter.score(candidates.sorted[min(int(slot.top_k), count) - 1]);
    filter.floor = fmaxf(filter.floor, kth);
    total = 0;
  }
  if (slot.top_p < 1.0f) {
    if (total == 0) {
      for (int k = lane; k < count; k += kWarpSize) total += weight_at(k, score);
      total = warp_reduce(total, Add());
    }
    const Weight target = min(max(share_of(total, slot.top_p), Weight{1}), total);
    Weight before = 0;
    for (int first = 0; first < count; first += kWarpSize) {
      Weight upto = weight_at(first + lane, score);
#pragma unroll
      for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const Weight other = __shfl_up_sync(kAllLanes, upto, lanes);
        if (lane >= lanes) upto += other;
      }
      const uint32_t reached = __ballot_sync(kAllLanes, before + upto >= target);
      if (reached != 0) {
        const float last = __shfl_sync(kAllLanes, score, __ffs(int(reached)) - 1);
        filter.floor = fmaxf(filter.floor, last);
        break;
      }
      before += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    }
  }
  keep_min_p(slot, filter);
}

// Does what `race` does, on sorted candidates. One warp calls it. Two passes, because the exact
// time takes 1 us: only the lanes close to the best of all compute it.
__device__ __forceinline__ int race_few(const SampleSlot& slot, int count,
                                        const Candidates& candidates, const ScoreFilter& filter) {
  const int lane = int(threadIdx.x) % kWarpSize;
  const auto word_of = [&](int id) {
    return philox(uint32_t(id), uint32_t(slot.choice), uint64_t(slot.position), slot.seed);
  };
  float nearest = INFINITY;
#pragma unroll 1
  for (int k = lane; k < count; k += kWarpSize) {
    const float score = filter.score(candidates.sorted[k]);
    if (!filter.keeps(score)) break;
    const uint32_t word = word_of(candidates.ids[candidates.places[k]]);
    nearest = fminf(nearest, log_arrival_nearly(word) - score);
  }
  nearest = warp_reduce(nearest, Min());
  const float bound = nearest + 2e-3f + 2e-5f * fabsf(nearest);
  double best = INFINITY;
  int winner = INT_MAX;
#pragma unroll 1
  for (int k = lane; k < count; k += kWarpSize) {
    const float score = filter.score(candidates.sorted[k]);
    if (!filter.keeps(score)) break;
    const int id = candidates.ids[candidates.places[k]];
    const uint32_t word = word_of(id);
    if (!(log_arrival_nearly(word) - score <= bound)) continue;
    const double arrival = log_arrival(word) - double(score);
    if (arrival < best || (arrival == best && id < winner)) {
      best = arrival;
      winner = id;
    }
  }
  const double first = warp_reduce(best, Min());
  return warp_reduce(best == first ? winner : INT_MAX, Min());
}

// Narrows the filter to a row's set and returns the element sampled from it.
__device__ __forceinline__ int pick_few(const SampleSlot& slot, int count, Weight total, int n,
                                        Candidates& candidates, ScoreFilter& filter) {
  sort_few(count, candidates);
  if (threadIdx.x < kWarpSize) {
    narrow_few(slot, count, total, n, candidates, filter);
    const int winner = race_few(slot, count, candidates, filter);
    if (threadIdx.x == 0) {
      candidates.floor = filter.floor;
      candidates.winner = winner;
    }
  }
  __syncthreads();
  filter.floor = candidates.floor;
  return candidates.winner;
}

}  // namespace tgi::cuda
