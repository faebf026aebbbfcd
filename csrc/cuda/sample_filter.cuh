// Applies a slot's parameters to a row: penalties, bias and masks, the set of candidates, and the
// race among them.
#pragma once

#include "philox.cuh"
#include "sample_rows.cuh"

namespace tgi::cuda {

__device__ __forceinline__ bool has_penalties(const SampleSlot& slot) {
  return slot.repetition_penalty != 1.0f || slot.frequency_penalty != 0.0f ||
         slot.presence_penalty != 0.0f;
}

__device__ __forceinline__ float penalise(const SampleSlot& slot, float x, int32_t count) {
  if (count == 0) return x;
  x = x > 0 ? x / slot.repetition_penalty : x * slot.repetition_penalty;
  const int32_t in_output = count >> 1;
  return in_output == 0 ? x
                        : x - (slot.frequency_penalty * float(in_output) + slot.presence_penalty);
}

// Returns the row's words of the mask, or null.
__device__ __forceinline__ const int32_t* mask_of(const SampleParams& all, int64_t row) {
  if (all.base.mask == nullptr) return nullptr;
  const int64_t index = all.mask_rows[row];
  const bool is_valid = index >= 0 && index < all.num_masks;
  return is_valid ? all.base.mask + index * ((all.base.vocab + 31) / 32) : nullptr;
}

__device__ __forceinline__ bool has_masked_ids(const SampleSlot& slot) {
  return slot.num_masked > 0 && slot.position < slot.masked_until;
}

// Returns whether anything changes the slot's logits.
__device__ __forceinline__ bool is_modified(const SampleSlot& slot, const int32_t* mask) {
  return has_penalties(slot) || slot.num_biased != 0 || has_masked_ids(slot) || mask != nullptr;
}

// Writes these elements, after penalties, bias and masks, to the row `out` [vocab].
__device__ __forceinline__ void modify(const ::tgi::SampleParams& p, int64_t slot_index,
                                       const SampleSlot& slot, const int32_t* mask,
                                       const Elements& e, float* out) {
  const bool is_penalised = has_penalties(slot);
  const int32_t* counts = p.counts + slot_index * p.vocab;
  const int end = e.first + e.count;
  for (int i = e.first + int(threadIdx.x); i < end; i += kRowThreads) {
    float x = e.x[i];
    if (is_penalised) x = penalise(slot, x, counts[i]);
    if (mask != nullptr && (uint32_t(mask[i / 32]) >> (i % 32) & 1u) == 0) x = -INFINITY;
    out[i] = x;
  }
  __syncthreads();
  const int num_biased = min(slot.num_biased, int32_t(p.biased_stride));
  for (int i = int(threadIdx.x); i < num_biased; i += kRowThreads) {
    const int32_t id = p.biased_ids[slot_index * p.biased_stride + i];
    if (id >= e.first && id < end) out[id] += p.biased_values[slot_index * p.biased_stride + i];
  }
  __syncthreads();
  const int num_masked = has_masked_ids(slot) ? min(slot.num_masked, int32_t(p.masked_stride)) : 0;
  for (int i = int(threadIdx.x); i < num_masked; i += kRowThreads) {
    const int32_t id = p.masked_ids[slot_index * p.masked_stride + i];
    if (id >= e.first && id < end) out[id] = -INFINITY;
  }
  __syncthreads();
}

// The scores (the best is 0) that may be sampled: those >= `floor` and within `radius` of `mean`.
struct ScoreFilter {
  float max, factor;
  float floor, mean, radius;

  __device__ __forceinline__ float score(float value) const { return (value - max) * factor; }
  __device__ __forceinline__ bool keeps(float score) const {
    return score >= floor && fabsf(score - mean) <= radius;
  }
};

__device__ __forceinline__ bool is_greedy(const SampleSlot& slot) {
  return slot.temperature == 0.0f;
}

__device__ __forceinline__ bool has_top_k(const SampleSlot& slot, int n) {
  return slot.top_k > 0 && slot.top_k < n;
}

// Returns a share of the row's weight, for top-p and typical-p.
__device__ __forceinline__ Weight share_of(Weight total, float p) {
  return static_cast<Weight>(ceil(double(total) * p));
}

// Keeps all scores of a row with this maximum. A temperature near 0 must not make the best score 0
// * infinity; in greedy mode, scores are the values minus the best.
__device__ __forceinline__ ScoreFilter keep_all(const SampleSlot& slot, float max) {
  const float factor = is_greedy(slot) ? 1.0f : fminf(1.0f / slot.temperature, FLT_MAX);
  return {max, factor, -FLT_MAX, 0.0f, INFINITY};
}

__device__ __forceinline__ void keep_min_p(const SampleSlot& slot, ScoreFilter& filter) {
  if (slot.min_p > 0.0f) filter.floor = fmaxf(filter.floor, logf(slot.min_p));
}

// Returns the mean score of the elements kept so far. Meister et al., Locally Typical Sampling,
// section 4.
__device__ __forceinline__ float mean_score(const Elements& e, const ScoreFilter& filter,
                                            RowShared& shared) {
  double mass = 0, weighted = 0;
  for_each(e, [&](int, float x) {
    const float score = filter.score(x);
    if (!(score >= filter.floor)) return;
    const float weight = expf(score);
    mass += weight;
    weighted += double(weight) * score;
  });
  mass = block_reduce(mass, Add(), shared.doubles);
  return static_cast<float>(block_reduce(weighted, Add(), shared.doubles) / mass);
}

// Applies top-k, top-p over the renormalised top-k set, min-p and typical-p (the most typical
// scores, up to this share of the weight kept so far). Cut-offs keep complete ties. `total` is the
// row's weight if `e` is not the whole row; 0 if it is. The three searches share their code: three
// copies of it would not fit the instruction cache.
__device__ __forceinline__ void narrow_filter(const SampleSlot& slot, const Elements& e,
                                              Weight total, int n, ScoreFilter& filter,
                                              RowShared& shared) {
  enum { kTopK, kTopP, kTypical };
#pragma unroll 1
  for (int step = kTopK; step <= kTypical; ++step) {
    if (step == kTypical) keep_min_p(slot, filter);
    const float p = step == kTopP ? slot.top_p : slot.typical_p;
    if (step == kTopK ? !has_top_k(slot, n) : !(p < 1.0f)) continue;
    const float mean = step == kTypical ? mean_score(e, filter, shared) : 0.0f;
    const auto weigh = [&](float x, float& distance) {
      const float score = filter.score(x);
      distance = fabsf(score - mean);
      if (!(score >= filter.floor)) return Weight{0};
      return step == kTopK ? Weight{1} : to_weight(score);
    };
    const auto share = [&](Weight all) {
      return step == kTopK ? static_cast<Weight>(slot.top_k) : share_of(all, p);
    };
    const float cutoff = find_cutoff(e, step == kTopP ? total : Weight{0}, weigh, share, shared);
    if (step == kTypical) {
      filter.radius = cutoff;
      filter.mean = mean;
    } else {
      filter.floor = fmaxf(filter.floor, -cutoff);
    }
    total = 0;  // now of a set all of which is in `e`
  }
}

// The winner of the race: the element with the lowest log E - score, lowest id on ties.
struct Winner {
  double arrival;
  int64_t id;
};

// Computes the exact time only for elements close to the best so far: a logarithm in double costs
// as much as a hundred other instructions.
__device__ __forceinline__ Winner race(const SampleSlot& slot, const Elements& e,
                                       const ScoreFilter& filter, RowShared& shared) {
  double best = INFINITY;
  int winner = INT_MAX;
  float bound = INFINITY;
  // One at a time, not four: the code of an iteration is long.
  for (int k = int(threadIdx.x); k < e.count; k += kRowThreads) {
    const int i = e.id_of(k);
    const float score = filter.score(e.x[i]);
    if (!filter.keeps(score)) continue;
    const uint32_t word =
        philox(uint32_t(i), uint32_t(slot.choice), uint64_t(slot.position), slot.seed);
    if (!(log_arrival_nearly(word) - score <= bound)) continue;
    const double arrival = log_arrival(word) - double(score);
    if (arrival < best || (arrival == best && i < winner)) {
      best = arrival;
      winner = i;
      bound = float(best) + 1e-3f + 1e-5f * fabsf(float(best));
    }
  }
  const double first = block_reduce(best, Min(), shared.doubles);
  return {first, block_reduce(best == first ? winner : INT_MAX, Min(), shared.ints)};
}

}  // namespace tgi::cuda
