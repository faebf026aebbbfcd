// One token a row of logits, by its slot's parameters: one block a row, no sort.
// tgi_asgi/ops/sample.py has the order of the filters; csrc/cpu/sample.cpp draws the same tokens,
// but for ties in the last bit.
#include "kernels.h"
#include "philox.cuh"
#include "sample_rows.cuh"

namespace tgi::cuda {
namespace {

constexpr float kNaN = NAN;

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

// The row's words of the mask, or null.
__device__ __forceinline__ const int32_t* mask_of(const SampleParams& all, int64_t row) {
  if (all.base.mask == nullptr) return nullptr;
  const int64_t index = all.mask_rows[row];
  const bool is_there = index >= 0 && index < all.num_masks;
  return is_there ? all.base.mask + index * ((all.base.vocab + 31) / 32) : nullptr;
}

// The row's logits after penalties, bias and masks: in `room` where anything applies, else where
// they are.
__device__ __forceinline__ const float* modify(const ::tgi::SampleParams& p, int64_t slot_index,
                                               const SampleSlot& slot, const int32_t* mask,
                                               const float* logits, float* room) {
  const int n = int(p.vocab);
  const bool is_penalised = has_penalties(slot);
  const bool is_held = slot.num_masked > 0 && slot.position < slot.masked_until;
  if (!is_penalised && slot.num_biased == 0 && !is_held && mask == nullptr) return logits;
  const int32_t* counts = p.counts + slot_index * p.vocab;
  for (int i = int(threadIdx.x); i < n; i += kRowThreads) {
    float x = logits[i];
    if (is_penalised) x = penalise(slot, x, counts[i]);
    if (mask != nullptr && (uint32_t(mask[i / 32]) >> (i % 32) & 1u) == 0) x = -INFINITY;
    room[i] = x;
  }
  __syncthreads();
  const int num_biased = min(slot.num_biased, int32_t(p.biased_stride));
  for (int i = int(threadIdx.x); i < num_biased; i += kRowThreads) {
    const int32_t id = p.biased_ids[slot_index * p.biased_stride + i];
    if (id >= 0 && id < n) room[id] += p.biased_values[slot_index * p.biased_stride + i];
  }
  __syncthreads();
  const int num_masked = is_held ? min(slot.num_masked, int32_t(p.masked_stride)) : 0;
  for (int i = int(threadIdx.x); i < num_masked; i += kRowThreads) {
    const int32_t id = p.masked_ids[slot_index * p.masked_stride + i];
    if (id >= 0 && id < n) room[id] = -INFINITY;
  }
  __syncthreads();
  return room;
}

// The scores (best 0) that may be drawn: those of at least `floor`, and no further from `mean` than
// `reach`.
struct Kept {
  const float* values;
  float max, factor;
  float floor, mean, reach;

  __device__ __forceinline__ float score(float value) const { return (value - max) * factor; }
  __device__ __forceinline__ bool has(float score) const {
    return score >= floor && fabsf(score - mean) <= reach;
  }
};

// Keeps the most typical scores that weigh typical_p of those kept so far. Meister et al., Locally
// Typical Sampling, section 4.
__device__ __forceinline__ void keep_typical(float typical_p, int n, Kept& kept, RowRoom& room) {
  double mass = 0, weighted = 0;
  for_each(kept.values, n, [&](int, float x) {
    const float score = kept.score(x);
    if (!(score >= kept.floor)) return;
    const float weight = expf(score);
    mass += weight;
    weighted += double(weight) * score;
  });
  mass = block_reduce(mass, Add(), room.doubles);
  const auto mean = static_cast<float>(block_reduce(weighted, Add(), room.doubles) / mass);
  const auto weigh = [&](float x, float& distance) {
    const float score = kept.score(x);
    distance = fabsf(score - mean);
    return score >= kept.floor ? to_weight(score) : Weight{0};
  };
  const auto share = [=](Weight total) {
    return static_cast<Weight>(ceil(double(total) * typical_p));
  };
  kept.reach = reach(kept.values, n, weigh, share, room);
  kept.mean = mean;
}

// Applies top-k, top-p over the renormalised top-k set, min-p and typical-p. Cut-offs keep whole
// ties.
__device__ __forceinline__ void cut(const SampleSlot& slot, int n, Kept& kept, RowRoom& room) {
  if (slot.top_k > 0 && slot.top_k < n) {
    const auto weigh = [&](float x, float& distance) {
      const float score = kept.score(x);
      distance = fabsf(score);
      return Weight{score >= -FLT_MAX ? 1u : 0u};
    };
    const auto share = [&](Weight) { return static_cast<Weight>(slot.top_k); };
    kept.floor = -reach(kept.values, n, weigh, share, room);
  }
  if (slot.top_p < 1.0f) {
    const auto weigh = [&](float x, float& distance) {
      const float score = kept.score(x);
      distance = fabsf(score);
      return score >= kept.floor ? to_weight(score) : Weight{0};
    };
    const auto share = [&](Weight total) {
      return static_cast<Weight>(ceil(double(total) * slot.top_p));
    };
    kept.floor = fmaxf(kept.floor, -reach(kept.values, n, weigh, share, room));
  }
  if (slot.min_p > 0.0f) kept.floor = fmaxf(kept.floor, logf(slot.min_p));
  if (slot.typical_p < 1.0f) keep_typical(slot.typical_p, n, kept, room);
}

// The winner of the race: the index of the least log E - score, lowest on ties. The exact time is
// taken only of those who come near the best so far: a logarithm in double costs as much as a
// hundred other instructions.
__device__ __forceinline__ int race(const SampleSlot& slot, int n, const Kept& kept,
                                    RowRoom& room) {
  double best = INFINITY;
  int winner = n;
  float bound = INFINITY;
  // By one, not by four: its code is long.
  for (int i = int(threadIdx.x); i < n; i += kRowThreads) {
    const float score = kept.score(kept.values[i]);
    if (!kept.has(score)) continue;
    const uint32_t word =
        philox(uint32_t(i), uint32_t(slot.choice), uint64_t(slot.position), slot.seed);
    if (!(log_arrival_nearly(word) - score <= bound)) continue;
    const double arrival = log_arrival(word) - double(score);
    if (arrival < best) {
      best = arrival;
      winner = i;
      bound = float(best) + 1e-3f + 1e-5f * fabsf(float(best));
    }
  }
  const double first = block_reduce(best, Min(), room.doubles);
  return block_reduce(best == first ? winner : n, Min(), room.ints);
}

__global__ void __launch_bounds__(kRowThreads, 2) sample_kernel(SampleParams all) {
  SHARED_ARRAY(RowRoom, rooms, 1);
  RowRoom& room = rooms[0];
  const ::tgi::SampleParams& p = all.base;
  const int64_t row = blockIdx.x, slot_index = p.slots[row];
  const int n = int(p.vocab);
  const bool is_first = threadIdx.x == 0;
  if (is_first) {
    p.token_ids[row] = 0;
    p.is_finite[row] = false;
    p.logprobs[row] = kNaN;
    p.num_top[row] = 0;
  }
  if (slot_index < 0 || slot_index >= all.num_slots) return;
  // Not a copy, for which compute capability 8.0 has no registers left.
  const SampleSlot& slot = p.records[slot_index];
  const float* logits = p.logits + row * p.vocab;  // [vocab]
  const RowStats raw = row_stats(logits, n, room);
  if (!raw.is_finite) return;
  const float* values =
      modify(p, slot_index, slot, mask_of(all, row), logits, all.scratch + row * p.vocab);
  const RowStats stats = values == logits ? raw : row_stats(values, n, room);
  if (!stats.is_finite || stats.max == -INFINITY) return;

  // A temperature near 0 must not make the best score 0 * infinity; greedy, scores are the values
  // less the best.
  const bool is_greedy = slot.temperature == 0.0f;
  const float factor = is_greedy ? 1.0f : fminf(1.0f / slot.temperature, FLT_MAX);
  Kept kept = {values, stats.max, factor, -FLT_MAX, 0.0f, INFINITY};
  int id;
  if (is_greedy) {
    id = row_find(values, n, stats.max, room);
  } else {
    cut(slot, n, kept, room);
    id = race(slot, n, kept, room);
  }
  if ((slot.flags & kWantsLogprobs) != 0) {
    const int wanted = min(max(slot.num_top, int32_t{0}), int32_t(p.max_top));
    int32_t* top_ids = p.top_ids + row * p.max_top;
    float* top_logprobs = p.top_logprobs + row * p.max_top;
    int filled;
    if ((slot.flags & kIsProcessed) != 0) {
      const auto value = [&](float x) {
        const float score = kept.score(x);
        return kept.has(score) ? score : -INFINITY;
      };
      filled = describe(values, n, value, 0.0f, id, wanted, p.logprobs + row, top_ids, top_logprobs,
                        room);
    } else {
      const auto value = [](float x) { return x; };
      filled = describe(logits, n, value, raw.max, id, wanted, p.logprobs + row, top_ids,
                        top_logprobs, room);
    }
    if (is_first) p.num_top[row] = filled;
  }
  if (!is_first) return;
  p.token_ids[row] = id;
  p.is_finite[row] = true;
  p.records[slot_index].last_id = id;
  p.records[slot_index].position = slot.position + 1;
  if (has_penalties(slot)) p.counts[slot_index * p.vocab + id] += 2;
}

__global__ void __launch_bounds__(kRowThreads, 2) token_logprobs_kernel(TokenLogprobsParams all) {
  SHARED_ARRAY(RowRoom, rooms, 1);
  RowRoom& room = rooms[0];
  const ::tgi::TokenLogprobsParams& p = all.base;
  const int64_t row = blockIdx.x;
  const int n = int(p.vocab), num_top = int(p.num_top);
  const float* logits = p.logits + row * p.vocab;  // [vocab]
  int32_t* top_ids = p.top_ids + row * p.num_top;
  float* top_logprobs = p.top_logprobs + row * p.num_top;
  const RowStats stats = row_stats(logits, n, room);
  int filled = 0;
  if (stats.is_finite && stats.max > -INFINITY) {
    const int id = min(max(p.token_ids[row], int32_t{0}), int32_t(n - 1));
    filled = describe(
        logits, n, [](float x) { return x; }, stats.max, id, num_top, p.logprobs + row, top_ids,
        top_logprobs, room);
  } else if (threadIdx.x == 0) {
    p.logprobs[row] = kNaN;
  }
  for (int i = filled + int(threadIdx.x); i < num_top; i += kRowThreads) {
    top_ids[i] = 0;
    top_logprobs[i] = stats.is_finite ? -INFINITY : kNaN;
  }
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (p.base.vocab < 1 || p.base.vocab > (1 << 30)) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  return launch(sample_kernel, dim3(unsigned(p.num_rows)), dim3(kRowThreads), 0, stream, p);
}

cudaError_t token_logprobs(const TokenLogprobsParams& p, cudaStream_t stream) {
  if (p.base.vocab < 1 || p.base.vocab > (1 << 30)) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  return launch(token_logprobs_kernel, dim3(unsigned(p.num_rows)), dim3(kRowThreads), 0, stream, p);
}

}  // namespace tgi::cuda
