// Two kernels that run before the sampling kernel. The blocks that share a row each process their
// part of it and write these results:
//
//     part_stats   the part's maximum, whether all of it is finite, its logits after penalties,
//                  bias and masks, and the maximum of each group of elements
//     part_scores  only if needed: the winner of the race if nothing is cut off; a histogram of the
//                  part's scores, added to the row's, if the sum of all is needed
//
// A group consists of the elements that one thread has read, or a few neighbours. The k-th largest
// of 2,048 groups' maxima is a lower bound of the row's k-th largest element, so the sampling
// kernel finds the top k in about k groups and reads no others.
//
// Each kernel begins when the previous one has ended, so no block waits for another. Histograms are
// sums of integers, so neither the number of parts nor their order affects the result.
#pragma once

#include "sample_filter.cuh"

namespace tgi::cuda {

constexpr int kMaxParts = kWarpSize;  // one per lane
constexpr int kMinPart = 512;         // elements
constexpr int kGroups = 2048;         // most of a row

struct PartStats {
  float raw_max, max;  // of the original logits, and of those sampled from
  int32_t first;       // element of `max`
  int32_t is_finite;
};

// For one row: the weight e^score of its elements, by bins of the distance from the best.
struct Histogram {
  Weight weights[kBins];
};

// How a row is shared among blocks, and among groups of elements.
struct Split {
  int num_parts;
  int lanes;  // adjacent threads whose elements are a group: a power of two

  __host__ __device__ __forceinline__ int groups_per_part() const { return kRowThreads / lanes; }
};

struct RowWork {
  PartStats stats[kMaxParts];
  Winner winners[kMaxParts];
  float group_max[kGroups];      // of the values sampled from
  float raw_group_max[kGroups];  // of the original logits, if they differ and their best are wanted
  Histogram scores;              // of the values sampled from
  Histogram raw;                 // of the original logits
};
static_assert(sizeof(RowWork) % 16 == 0);

// A row, and what its slot requires. Each kernel constructs it again.
struct SampledRow {
  int64_t index, slot_index;
  bool is_valid;  // false: padding
  int n;

  __device__ __forceinline__ SampledRow(const SampleParams& all, int64_t row)
      : index(row),
        slot_index(all.base.slots[row]),
        is_valid(slot_index >= 0 && slot_index < all.num_slots),
        n(int(all.base.vocab)) {}

  __device__ __forceinline__ const SampleSlot& slot(const SampleParams& all) const {
    return all.base.records[slot_index];
  }
  __device__ __forceinline__ RowWork& work(const SampleParams& all) const {
    return static_cast<RowWork*>(all.workspace)[index];
  }
  __device__ __forceinline__ const float* logits(const SampleParams& all) const {
    return all.base.logits + index * all.base.vocab;
  }
  // Returns the values to sample from: the logits, or those that `part_stats` has modified.
  __device__ __forceinline__ const float* values(const SampleParams& all) const {
    return is_modified(slot(all), mask_of(all, index)) ? all.scratch + index * all.base.vocab
                                                       : logits(all);
  }

  // Returns whether the set is smaller than all scores that min-p keeps.
  __device__ __forceinline__ bool is_cut(const SampleSlot& slot) const {
    return !is_greedy(slot) && (has_top_k(slot, n) || slot.top_p < 1.0f || slot.typical_p < 1.0f);
  }
  __device__ __forceinline__ bool wants_raw(const SampleSlot& slot) const {
    return (slot.flags & kWantsLogprobs) != 0 && (slot.flags & kIsProcessed) == 0;
  }
  __device__ __forceinline__ bool wants_processed(const SampleSlot& slot) const {
    return (slot.flags & kWantsLogprobs) != 0 && (slot.flags & kIsProcessed) != 0;
  }
  __device__ __forceinline__ int num_top(const SampleParams& all, const SampleSlot& slot) const {
    return min(max(slot.num_top, int32_t{0}), int32_t(all.base.max_top));
  }
  // The weights for typical-p's mean are floats, which must be added in row order.
  __device__ __forceinline__ bool has_candidates(const SampleSlot& slot) const {
    return is_cut(slot) && !(slot.typical_p < 1.0f);
  }
  // Returns whether the candidates are those of the largest weight, not a number of them.
  __device__ __forceinline__ bool are_by_weight(const SampleSlot& slot) const {
    return has_candidates(slot) && !has_top_k(slot, n);
  }
  __device__ __forceinline__ bool needs_scores(const SampleSlot& slot) const {
    return are_by_weight(slot) || (wants_processed(slot) && !is_cut(slot));
  }

  // Returns the scores for part_scores' histogram: for cut sets, those before the cut.
  __device__ __forceinline__ ScoreFilter filter(const SampleSlot& slot, float max) const {
    ScoreFilter filter = keep_all(slot, max);
    if (!is_cut(slot) && !is_greedy(slot)) keep_min_p(slot, filter);
    return filter;
  }
};

// Returns a block's part of a row: whole runs of four.
__device__ __forceinline__ Elements part_of(const float* x, int n, int part, int num_parts) {
  const int length = ceil_divide(ceil_divide(n, num_parts), 4) * 4;
  const int first = min(part * length, n);
  return {x, first, min(length, n - first)};
}

struct MergedStats {
  float raw_max;
  Stats stats;

  __device__ __forceinline__ bool can_sample() const {
    return stats.is_finite && stats.max > -INFINITY;
  }
};

// Merges the parts' maxima, in each warp by itself.
__device__ __forceinline__ MergedStats merge_stats(const RowWork& work, int num_parts) {
  const int lane = int(threadIdx.x) % kWarpSize;
  PartStats own = {-INFINITY, -INFINITY, INT_MAX, 1};
  if (lane < num_parts) own = work.stats[lane];
  const float max = warp_reduce(own.max, Max());
  const int first = warp_reduce(own.max == max ? own.first : INT_MAX, Min());
  return {warp_reduce(own.raw_max, Max()), {max, first, warp_reduce(own.is_finite, Min()) != 0}};
}

__device__ __forceinline__ int merge_winners(const RowWork& work, int num_parts) {
  const int lane = int(threadIdx.x) % kWarpSize;
  Winner own = {INFINITY, INT_MAX};
  if (lane < num_parts) own = work.winners[lane];
  const double first = warp_reduce(own.arrival, Min());
  return warp_reduce(own.arrival == first ? int(own.id) : INT_MAX, Min());
}

__device__ __forceinline__ void clear_part(Histogram& histogram, int part, int num_parts) {
  for (int bin = part * kRowThreads + int(threadIdx.x); bin < kBins;
       bin += num_parts * kRowThreads) {
    histogram.weights[bin] = 0;
  }
}

// Writes the maxima of a part's groups, from those of its threads.
__device__ __forceinline__ void store_groups(float largest, const Split& split, int part,
                                             float* group_max) {
  for (int lanes = 1; lanes < split.lanes; lanes *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
  const int thread = int(threadIdx.x);
  if (thread % split.lanes != 0) return;
  group_max[part * split.groups_per_part() + thread / split.lanes] = largest;
}

__global__ void __launch_bounds__(kRowThreads, 2) part_stats_kernel(SampleParams all, Split split) {
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(RowShared, shared_rows, 1);
  RowShared& shared = shared_rows[0];
  const SampledRow row(all, blockIdx.y);
  if (!row.is_valid) return;
  const int part = int(blockIdx.x);
  const SampleSlot& slot = row.slot(all);
  RowWork& work = row.work(all);
  const Elements logits = part_of(row.logits(all), row.n, part, split.num_parts);
  float largest;
  const Stats raw = find_stats(logits, largest, shared);
  Stats stats = raw;
  const int32_t* mask = mask_of(all, row.index);
  if (is_modified(slot, mask)) {
    if (row.wants_raw(slot)) store_groups(largest, split, part, work.raw_group_max);
    float* out = all.scratch + row.index * all.base.vocab;
    modify(all.base, row.slot_index, slot, mask, logits, out);
    stats = find_stats(Elements{out, logits.first, logits.count}, largest, shared);
  }
  store_groups(largest, split, part, work.group_max);
  if (row.needs_scores(slot)) clear_part(work.scores, part, split.num_parts);
  if (row.wants_raw(slot)) clear_part(work.raw, part, split.num_parts);
  if (threadIdx.x == 0) {
    work.stats[part] = {raw.max, stats.max, stats.first, raw.is_finite && stats.is_finite};
  }
}

// Adds the weights of these scores to the row's histogram, via shared memory.
template <typename Score>
__device__ __forceinline__ void fill(const Elements& e, float floor, const Score& score,
                                     RowShared& shared, Histogram& histogram) {
  __syncthreads();  // all threads have finished with the bins of an earlier call
  clear_bins(shared);
  __syncthreads();
  for_each<2>(e, [&](int, float x) {
    const float own = score(x);
    if (!(own >= floor)) return;
    const Weight weight = to_weight(own);
    if (weight != 0) add_to_bin(shared, linear_bin(-own), weight);
  });
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) {
    const Weight weight = weight_of_bin(shared, bin);
    if (weight != 0) atomicAdd(&histogram.weights[bin], weight);
  }
}

__global__ void __launch_bounds__(kRowThreads, 2)
    part_scores_kernel(SampleParams all, Split split) {
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(RowShared, shared_rows, 1);
  RowShared& shared = shared_rows[0];
  const SampledRow row(all, blockIdx.y);
  if (!row.is_valid) return;
  const SampleSlot& slot = row.slot(all);
  const bool is_race = !is_greedy(slot) && !row.is_cut(slot);
  if (!is_race && !row.needs_scores(slot) && !row.wants_raw(slot)) return;
  RowWork& work = row.work(all);
  const MergedStats merged = merge_stats(work, split.num_parts);
  if (!merged.can_sample()) return;
  const ScoreFilter filter = row.filter(slot, merged.stats.max);
  const int part = int(blockIdx.x);
  const Elements values = part_of(row.values(all), row.n, part, split.num_parts);
  if (is_race) {
    const Winner winner = race(slot, values, filter, shared);
    if (threadIdx.x == 0) work.winners[part] = winner;
  }
  if (row.needs_scores(slot)) {
    const auto score = [&](float x) { return filter.score(x); };
    fill(values, filter.floor, score, shared, work.scores);
  }
  if (row.wants_raw(slot)) {
    const auto score = [&](float x) { return x - merged.raw_max; };
    const Elements logits = part_of(row.logits(all), row.n, part, split.num_parts);
    fill(logits, -FLT_MAX, score, shared, work.raw);
  }
}

}  // namespace tgi::cuda
