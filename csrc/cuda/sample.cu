// Samples one token per row of logits with its slot's parameters: two kernels over parts of rows
// (sample_parts.cuh), then one block per row, among few candidates if it has a top-k or top-p
// (sample_candidates.cuh). tgi_asgi/ops/sample.py documents the order of the filters;
// csrc/cpu/sample.cpp samples the same tokens, except for ties in the last bit.
#include "kernels.h"
#include "sample_candidates.cuh"

namespace tgi::cuda {
namespace {

constexpr float kNaN = NAN;

__device__ __forceinline__ Weight sum_of(const Histogram& histogram, RowShared& shared) {
  Weight total = 0;
  for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) total += histogram.weights[bin];
  return block_reduce(total, Add(), shared.weights);
}

// Returns the weight of these elements' scores, as far as they are kept.
template <typename Value>
__device__ __forceinline__ Weight sum_of(const Elements& e, const Value& value, RowShared& shared) {
  Weight total = 0;
  for_each(e, [&](int, float x) { total += to_weight(value(x)); });
  return block_reduce(total, Add(), shared.weights);
}

__global__ void __launch_bounds__(kRowThreads, 2) sample_kernel(SampleParams all, Split split) {
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(RowShared, shared_rows, 1);
  SHARED_ARRAY(Candidates, shared_candidates, 1);
  RowShared& shared = shared_rows[0];
  Candidates& candidates = shared_candidates[0];
  const ::tgi::SampleParams& p = all.base;
  const SampledRow row(all, blockIdx.x);
  const bool is_first = threadIdx.x == 0;
  if (is_first) {
    p.token_ids[row.index] = 0;
    p.is_finite[row.index] = false;
    p.logprobs[row.index] = kNaN;
    p.num_top[row.index] = 0;
  }
  if (!row.is_valid) return;
  // Not a copy: compute capability 8.0 has no registers left for it.
  const SampleSlot& slot = row.slot(all);
  const RowWork& work = row.work(all);
  const MergedStats merged = merge_stats(work, split.num_parts);
  if (!merged.can_sample()) return;
  const int n = row.n;
  const float* values = row.values(all);
  ScoreFilter filter = row.filter(slot, merged.stats.max);
  Elements set = {values, 0, n};  // contains everything that is kept
  int id;
  if (is_greedy(slot)) {
    id = merged.stats.first;
  } else if (row.is_cut(slot)) {
    Weight total = 0;
    if (row.has_candidates(slot)) {
      // A number of elements is counted in logits: at a low temperature, scores leave the bins.
      const bool are_by_weight = row.are_by_weight(slot);
      const Binned binned = {values, work.group_max, filter.max,
                             are_by_weight ? filter.factor : 1.0f};
      if (are_by_weight) total = sum_of(work.scores, shared);
      const int last = are_by_weight ? bin_of_weight(work.scores, total, slot.top_p, shared)
                                     : bin_of_count(binned, split, slot.top_k, shared);
      set = list(binned, n, split, last, candidates, shared);
    }
    if (set.listed != nullptr && set.count <= kFew) {
      id = pick_few(slot, set.count, total, n, candidates, filter);
    } else {
      narrow_filter(slot, set, total, n, filter, shared);
      id = int(race(slot, set, filter, shared).id);
    }
  } else {
    id = merge_winners(work, split.num_parts);
  }
  int filled = 0;
  if (row.wants_processed(slot) || row.wants_raw(slot)) {
    const int wanted = row.num_top(all, slot);
    const bool is_raw = row.wants_raw(slot), is_set = !is_raw && row.is_cut(slot);
    const float* logits = row.logits(all);
    const ScoreFilter shown =
        is_raw ? ScoreFilter{merged.raw_max, 1.0f, -FLT_MAX, 0.0f, INFINITY} : filter;
    const auto value = [&](float x) {
      const float score = shown.score(x);
      return shown.keeps(score) ? score : -INFINITY;
    };
    const Weight total =
        is_set ? sum_of(set, value, shared) : sum_of(is_raw ? work.raw : work.scores, shared);
    if (is_raw) set = {logits, 0, n};
    if (!is_set && wanted > 0) {
      const bool is_modified = is_raw && logits != values;
      const Binned binned = {set.x, is_modified ? work.raw_group_max : work.group_max, shown.max,
                             1.0f};
      set = list(binned, n, split, bin_of_count(binned, split, wanted, shared), candidates, shared);
    }
    filled =
        describe(set, value, log_of(total), id, wanted, p.logprobs + row.index,
                 p.top_ids + row.index * p.max_top, p.top_logprobs + row.index * p.max_top, shared);
  }
  __syncthreads();  // all threads have read the slot
  if (!is_first) return;
  p.num_top[row.index] = filled;
  p.token_ids[row.index] = id;
  p.is_finite[row.index] = true;
  p.records[row.slot_index].last_id = id;
  p.records[row.slot_index].position = slot.position + 1;
  if (has_penalties(slot)) p.counts[row.slot_index * p.vocab + id] += 2;
}

__global__ void __launch_bounds__(kRowThreads, 2) token_logprobs_kernel(TokenLogprobsParams all) {
  SHARED_ARRAY(RowShared, shared_rows, 1);
  RowShared& shared = shared_rows[0];
  const ::tgi::TokenLogprobsParams& p = all.base;
  const int64_t row = blockIdx.x;
  const int n = int(p.vocab), num_top = int(p.num_top);
  const Elements logits = {p.logits + row * p.vocab, 0, n};
  int32_t* top_ids = p.top_ids + row * p.num_top;
  float* top_logprobs = p.top_logprobs + row * p.num_top;
  float largest;
  const Stats stats = find_stats(logits, largest, shared);
  int filled = 0;
  if (stats.is_finite && stats.max > -INFINITY) {
    const int id = min(max(p.token_ids[row], int32_t{0}), int32_t(n - 1));
    const auto value = [&](float x) { return x - stats.max; };
    const float normaliser = log_of(sum_of(logits, value, shared));
    filled = describe(logits, value, normaliser, id, num_top, p.logprobs + row, top_ids,
                      top_logprobs, shared);
  } else if (threadIdx.x == 0) {
    p.logprobs[row] = kNaN;
  }
  for (int i = filled + int(threadIdx.x); i < num_top; i += kRowThreads) {
    top_ids[i] = 0;
    top_logprobs[i] = stats.is_finite ? -INFINITY : kNaN;
  }
}

// Splits a row among as many blocks as the device runs at a time, or a single one for few elements.
Split split_of(int64_t num_rows, int64_t vocab) {
  const int64_t most = min(int64_t{kMaxParts}, ceil_divide(vocab, int64_t{kMinPart}));
  const int64_t held = 2 * num_multiprocessors() / num_rows;
  Split split = {int(max(int64_t{1}, min(most, held))), 1};
  while (split.num_parts * split.groups_per_part() > kGroups) split.lanes *= 2;
  return split;
}

}  // namespace

int64_t sample_workspace_bytes(int64_t num_rows) { return num_rows * int64_t{sizeof(RowWork)}; }

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (p.base.vocab < 1 || p.base.vocab > (1 << 30)) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  if (p.num_rows > kMaxSampledRows) return cudaErrorInvalidValue;
  const Split split = split_of(p.num_rows, p.base.vocab);
  const dim3 parts(unsigned(split.num_parts), unsigned(p.num_rows));
  for (const auto kernel : {part_stats_kernel, part_scores_kernel}) {
    const cudaError_t error =
        launch_dependent(kernel, parts, dim3(kRowThreads), 0, stream, p, split);
    if (error != cudaSuccess) return error;
  }
  return launch_dependent(sample_kernel, dim3(unsigned(p.num_rows)), dim3(kRowThreads), 0, stream,
                          p, split);
}

cudaError_t token_logprobs(const TokenLogprobsParams& p, cudaStream_t stream) {
  if (p.base.vocab < 1 || p.base.vocab > (1 << 30)) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  return launch(token_logprobs_kernel, dim3(unsigned(p.num_rows)), dim3(kRowThreads), 0, stream, p);
}

}  // namespace tgi::cuda
