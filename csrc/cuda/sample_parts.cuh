// Three kernels that run before the sampling kernel. The blocks that share a row each process their
// part of it and write these results:
//
//     part_stats   the part's maximum, whether all of it is finite, and its logits after penalties,
//                  bias and masks
//     part_scores  the winner of the race if nothing is cut off; else a histogram of the part's
//                  scores, added to the row's
//     part_list    the elements up to the bin in which the cut-off is: the few candidates
//
// Each kernel begins when the previous one has ended, so no block waits for another. Histograms are
// sums of integers, so neither the number of parts nor their order affects the result.
#pragma once

#include "sample_filter.cuh"

namespace tgi::cuda {

constexpr int kMaxParts = kWarpSize;    // one per lane
constexpr int kMinPart = 512;           // elements
constexpr int kCandidates = 2 * kBins;  // capacity of a list

struct PartStats {
  float raw_max, max;  // of the original logits, and of those sampled from
  int32_t first;       // element of `max`
  int32_t is_finite;
};

// For one row, by bins of the distance from the best: the number of elements, and their weight
// e^score.
struct Histogram {
  uint32_t counts[kBins];
  Weight weights[kBins];
  int32_t listed[kCandidates];
  int32_t num_listed;  // may exceed the capacity
  int32_t padding[3];
};

struct RowWork {
  PartStats stats[kMaxParts];
  Winner winners[kMaxParts];
  Histogram scores;  // of the values sampled from
  Histogram raw;     // of the original logits
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
  __device__ __forceinline__ bool needs_scores(const SampleSlot& slot) const {
    return has_candidates(slot) || (wants_processed(slot) && !is_cut(slot));
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
    histogram.counts[bin] = 0;
    histogram.weights[bin] = 0;
  }
  if (part == 0 && threadIdx.x == 0) histogram.num_listed = 0;
}

__global__ void __launch_bounds__(kRowThreads, 2)
    part_stats_kernel(SampleParams all, int num_parts) {
  wait_for_previous_kernel();
  allow_next_kernel();
  SHARED_ARRAY(RowShared, shared_rows, 1);
  RowShared& shared = shared_rows[0];
  const SampledRow row(all, blockIdx.y);
  if (!row.is_valid) return;
  const int part = int(blockIdx.x);
  const SampleSlot& slot = row.slot(all);
  RowWork& work = row.work(all);
  const Elements logits = part_of(row.logits(all), row.n, part, num_parts);
  const Stats raw = find_stats(logits, shared);
  Stats stats = raw;
  const int32_t* mask = mask_of(all, row.index);
  if (is_modified(slot, mask)) {
    float* out = all.scratch + row.index * all.base.vocab;
    modify(all.base, row.slot_index, slot, mask, logits, out);
    stats = find_stats(Elements{out, logits.first, logits.count}, shared);
  }
  if (row.needs_scores(slot)) clear_part(work.scores, part, num_parts);
  if (row.wants_raw(slot)) clear_part(work.raw, part, num_parts);
  if (threadIdx.x == 0) {
    work.stats[part] = {raw.max, stats.max, stats.first, raw.is_finite && stats.is_finite};
  }
}

// Adds the elements of these scores to the row's histogram, via shared memory.
template <typename Score>
__device__ __forceinline__ void fill(const Elements& e, float floor, const Score& score,
                                     uint32_t* counts, RowShared& shared, Histogram& histogram) {
  __syncthreads();  // all threads have finished with the bins of an earlier call
  clear_bins(shared);
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) counts[bin] = 0;
  __syncthreads();
  for_each(e, [&](int, float x) {
    const float own = score(x);
    if (!(own >= floor)) return;
    const int bin = linear_bin(-own);
    atomicAdd(&counts[bin], 1u);
    const Weight weight = to_weight(own);
    if (weight != 0) add_to_bin(shared, bin, weight);
  });
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) {
    if (counts[bin] == 0) continue;
    atomicAdd(&histogram.counts[bin], counts[bin]);
    atomicAdd(&histogram.weights[bin], weight_of_bin(shared, bin));
  }
}

__global__ void __launch_bounds__(kRowThreads, 2)
    part_scores_kernel(SampleParams all, int num_parts) {
  wait_for_previous_kernel();
  allow_next_kernel();
  SHARED_ARRAY(RowShared, shared_rows, 1);
  SHARED_ARRAY(uint32_t, counts, kBins);
  RowShared& shared = shared_rows[0];
  const SampledRow row(all, blockIdx.y);
  if (!row.is_valid) return;
  const SampleSlot& slot = row.slot(all);
  RowWork& work = row.work(all);
  const MergedStats merged = merge_stats(work, num_parts);
  if (!merged.can_sample()) return;
  const ScoreFilter filter = row.filter(slot, merged.stats.max);
  const Elements values = part_of(row.values(all), row.n, int(blockIdx.x), num_parts);
  if (!is_greedy(slot) && !row.is_cut(slot)) {
    const Winner winner = race(slot, values, filter, shared);
    if (threadIdx.x == 0) work.winners[blockIdx.x] = winner;
  }
  if (row.needs_scores(slot)) {
    const auto score = [&](float x) { return filter.score(x); };
    fill(values, filter.floor, score, counts, shared, work.scores);
  }
  if (row.wants_raw(slot)) {
    const auto score = [&](float x) { return x - merged.raw_max; };
    const Elements logits = part_of(row.logits(all), row.n, int(blockIdx.x), num_parts);
    fill(logits, -FLT_MAX, score, counts, shared, work.raw);
  }
}

// Returns the bin at which the set ends that consists of `count` elements, or with `top_p` of this
// share of the weight; -1 if there are no elements.
__device__ __forceinline__ int last_bin(const Histogram& histogram, int count, const float* top_p,
                                        RowShared& shared) {
  Weight total = 0;
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) {
    const Weight weight = top_p == nullptr ? histogram.counts[bin] : histogram.weights[bin];
    shared.low[bin] = static_cast<uint32_t>(weight);
    shared.high[bin] = static_cast<uint32_t>(weight >> 32);
    total += weight;
  }
  total = block_reduce(total, Add(), shared.weights);
  if (total == 0) return -1;
  const Weight wanted = top_p == nullptr ? Weight(count) : share_of(total, *top_p);
  find_bin(min(max(wanted, Weight{1}), total), shared);
  return shared.bin;
}

template <typename Score>
__device__ __forceinline__ void list(const Elements& e, float floor, int last, const Score& score,
                                     Histogram& histogram) {
  for_each(e, [&](int i, float x) {
    const float own = score(x);
    if (!(own >= floor) || linear_bin(-own) > last) return;
    const int place = atomicAdd(&histogram.num_listed, 1);
    if (place < kCandidates) histogram.listed[place] = i;
  });
}

__global__ void __launch_bounds__(kRowThreads, 2)
    part_list_kernel(SampleParams all, int num_parts) {
  wait_for_previous_kernel();
  allow_next_kernel();
  SHARED_ARRAY(RowShared, shared_rows, 1);
  RowShared& shared = shared_rows[0];
  const SampledRow row(all, blockIdx.y);
  if (!row.is_valid) return;
  const SampleSlot& slot = row.slot(all);
  const int wanted = row.num_top(all, slot);
  const bool lists_raw = row.wants_raw(slot) && wanted > 0;
  const bool lists_scores = row.has_candidates(slot) || (row.needs_scores(slot) && wanted > 0);
  if (!lists_raw && !lists_scores) return;
  RowWork& work = row.work(all);
  const MergedStats merged = merge_stats(work, num_parts);
  if (!merged.can_sample()) return;
  if (lists_scores) {
    const ScoreFilter filter = row.filter(slot, merged.stats.max);
    const auto score = [&](float x) { return filter.score(x); };
    const bool by_weight = row.has_candidates(slot) && !has_top_k(slot, row.n);
    const int count = row.has_candidates(slot) ? slot.top_k : wanted;
    const int last = last_bin(work.scores, count, by_weight ? &slot.top_p : nullptr, shared);
    list(part_of(row.values(all), row.n, int(blockIdx.x), num_parts), filter.floor, last, score,
         work.scores);
  }
  if (lists_raw) {
    __syncthreads();
    const auto score = [&](float x) { return x - merged.raw_max; };
    const int last = last_bin(work.raw, wanted, nullptr, shared);
    list(part_of(row.logits(all), row.n, int(blockIdx.x), num_parts), -FLT_MAX, last, score,
         work.raw);
  }
}

}  // namespace tgi::cuda
