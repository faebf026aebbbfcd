// The choice of each token's experts from the router's logits, and the order in which the experts'
// products process them.
//
//   ids      token 3: experts 1, 5    token 7: experts 1, 2           top_k = 2, ascending
//   pairs    expert 1: 6, 14          expert 2: 15      expert 5: 7   token * top_k + place
//   tiles    a few pairs of one expert each: the products' units of work
//
// Everything stays on the device: a host that waited for the counts would stop the step, and a
// graph could not be captured. Nothing here depends on the order in which threads run.
#include <cmath>

#include "experts.cuh"
#include "reduce.cuh"

namespace tgi::cuda {
namespace {

constexpr int kRouteWarps = 4;  // tokens of a block

// Returns a number that orders keys as floats do, and among equal keys the lower index first.
__device__ __forceinline__ uint64_t rank_of(float key, int index) {
  const uint32_t bits = __float_as_uint(key + 0.0f);  // -0 becomes 0
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~uint32_t(index);
}

// Indices that a warp has selected: lane l has those of l, l + 32 and so on, one bit each.
class Selection {
 public:
  // Selects the best key that is not selected yet; returns its index to all lanes. NaN counts as
  // the best: it reaches the logits, where it is detected.
  __device__ __forceinline__ int add_best(const float* keys, int size) {
    const int lane = int(threadIdx.x) % kWarpSize;
    uint64_t best = 0;  // below every key's rank
    for (int i = lane; i < size; i += kWarpSize) {
      if (bits_ >> (i / kWarpSize) & 1) continue;
      const float key = keys[i];
      best = max(best, rank_of(key == key ? key : INFINITY, i));
    }
    best = warp_reduce(best, Max());
    const int index = int(~uint32_t(best));
    if (index % kWarpSize == lane) bits_ |= 1u << (index / kWarpSize);
    return index;
  }

  // Returns whether this lane's index i is selected.
  __device__ __forceinline__ bool has(int i) const { return bits_ >> (i / kWarpSize) & 1; }

  // Returns whether any lane's index is selected; all lanes must call this.
  __device__ __forceinline__ bool has_any(int i) const {
    return __shfl_sync(kAllLanes, bits_, i % kWarpSize) >> (i / kWarpSize) & 1;
  }

 private:
  uint32_t bits_ = 0;
};
static_assert(kMaxExperts <= 32 * kWarpSize, "a bit for each of a lane's experts");

// Returns the sum over the warp of e^(logits - top); writes the terms to `out`.
__device__ __forceinline__ float exp_shifted(const float* logits, int size, float top, float* out) {
  float sum = 0;
  for (int i = int(threadIdx.x) % kWarpSize; i < size; i += kWarpSize) {
    out[i] = expf(logits[i] - top);
    sum += out[i];
  }
  return warp_reduce(sum, Add());
}

__device__ __forceinline__ void make_scores(const RouteParams& p, const float* logits,
                                            float* scores) {
  const int size = int(p.num_experts), lane = int(threadIdx.x) % kWarpSize;
  if (p.kind == RouteKind::kSoftmax) {
    float top = -INFINITY;
    for (int i = lane; i < size; i += kWarpSize) top = fmaxf(top, logits[i]);
    top = warp_reduce(top, Max());
    const float factor = __fdividef(1.0f, exp_shifted(logits, size, top, scores));
    for (int i = lane; i < size; i += kWarpSize) scores[i] *= factor;
    return;
  }
  for (int i = lane; i < size; i += kWarpSize) {
    scores[i] = __fdividef(1.0f, 1.0f + expf(-logits[i]));
  }
}

// Returns the score of a group of experts.
__device__ __forceinline__ float group_score(const float* keys, int size, bool sums_top_two) {
  float best = -INFINITY, second = -INFINITY;
  for (int i = 0; i < size; ++i) {
    const float key = keys[i];
    second = fmaxf(second, fminf(best, key));
    best = fmaxf(best, key);
  }
  return sums_top_two && size > 1 ? best + second : best;
}

// Replaces the keys of all but the best groups by -infinity. group_keys: [num_groups]
__device__ __forceinline__ void keep_groups(const RouteParams& p, float* keys, float* group_keys) {
  const int lane = int(threadIdx.x) % kWarpSize, num_groups = int(p.num_groups);
  const int num_experts = int(p.num_experts), size = num_experts / num_groups;
  for (int group = lane; group < num_groups; group += kWarpSize) {
    group_keys[group] = group_score(keys + group * size, size, p.sums_top_two != 0);
  }
  __syncwarp();
  Selection kept;
  for (int i = 0; i < int(p.top_groups); ++i) kept.add_best(group_keys, num_groups);
  for (int first = 0; first < num_experts; first += kWarpSize) {  // all lanes stay together
    const int expert = first + lane;
    const bool is_kept = kept.has_any(min(expert, num_experts - 1) / size);
    if (expert < num_experts && !is_kept) keys[expert] = -INFINITY;
  }
}

// Selects experts by their scores, which become weights; returns the factor on all weights.
__device__ __forceinline__ float select_by_scores(const RouteParams& p, float* scores, float* keys,
                                                  float* group_keys, Selection& selection) {
  const int size = int(p.num_experts), lane = int(threadIdx.x) % kWarpSize;
  for (int i = lane; i < size; i += kWarpSize) {
    const float key = p.correction == nullptr ? scores[i] : scores[i] + p.correction[i];
    keys[i] = key == key ? key : INFINITY;
  }
  __syncwarp();
  if (p.top_groups < p.num_groups) keep_groups(p, keys, group_keys);
  float sum = 0;
  for (int i = 0; i < int(p.top_k); ++i) sum += scores[selection.add_best(keys, size)];
  return p.is_renormalised ? __fdividef(p.scale, sum + p.eps) : p.scale;
}

// Selects experts one by one; each one's weight is its share of a softmax over the experts that are
// left and whose logits are near its own.
__device__ __forceinline__ void select_sparse(const RouteParams& p, const float* logits,
                                              float* weights, Selection& selection) {
  const int size = int(p.num_experts), lane = int(threadIdx.x) % kWarpSize;
  for (int n = 0; n < int(p.top_k); ++n) {
    const Selection before = selection;
    const int best = selection.add_best(logits, size);
    const float top = logits[best];
    float sum = 0;
    for (int i = lane; i < size; i += kWarpSize) {
      const float distance = top - logits[i], magnitude = fmaxf(fabsf(logits[i]), top);
      const bool is_far = distance > 2 * p.jitter * magnitude;
      if (!before.has(i) && !is_far) sum += expf(-distance);
    }
    sum = warp_reduce(sum, Add());
    if (best % kWarpSize == lane) weights[best] = __fdividef(p.scale, sum);
  }
}

// A warp routes a token.
__global__ void __launch_bounds__(kRouteWarps* kWarpSize, 4) route_kernel(RouteParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  DYNAMIC_SHARED(float, shared);  // [warp][logits, scores, keys][num_experts]
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int size = int(p.num_experts);
  const int64_t token = int64_t{blockIdx.x} * kRouteWarps + warp;
  if (token >= p.num_tokens) return;
  float* logits = shared + warp * 3 * size;
  float *scores = logits + size, *keys = scores + size;
  int32_t* ids = p.ids + token * p.top_k;
  float* weights = p.weights + token * p.top_k;
  if (p.slots[token] < 0) {
    for (int i = lane; i < int(p.top_k); i += kWarpSize) ids[i] = size, weights[i] = 0;
    return;
  }
  for (int i = lane; i < size; i += kWarpSize) logits[i] = p.logits[token * size + i];
  __syncwarp();
  Selection selection;
  float factor = 1;
  if (p.kind == RouteKind::kSparseMixer) {
    select_sparse(p, logits, scores, selection);
  } else {
    make_scores(p, logits, scores);
    factor = select_by_scores(p, scores, keys, logits, selection);  // logits are not read again
  }
  __syncwarp();
  // In ascending order, in which the experts' results are added.
  int before = 0;
  for (int first = 0; first < size; first += kWarpSize) {
    const int expert = first + lane;
    const bool is_mine = expert < size && selection.has(expert);
    const uint32_t all = __ballot_sync(kAllLanes, is_mine);
    if (is_mine) {
      const int place = before + __popc(all & ((1u << lane) - 1));
      ids[place] = expert;
      weights[place] = scores[expert] * factor;
    }
    before += __popc(all);
  }
}

constexpr int kPlanThreads = 512;
constexpr int kPlanWarps = kPlanThreads / kWarpSize;

// A block makes one expert's list. Each counts all experts itself, so that no block waits for
// another: 128 blocks read the ids of 4,096 tokens, 128 KB each, from the L2 cache at once.
__global__ void __launch_bounds__(kPlanThreads, 2)
    experts_plan_kernel(ExpertsPlanParams p, int tile_pairs) {
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(int, counts, kMaxExperts);
  SHARED_ARRAY(int, own, kPlanWarps);  // pairs of this expert in each warp's part of the ids
  SHARED_ARRAY(int, scratch, kPlanWarps);
  const int expert = int(blockIdx.x), thread = int(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int num_experts = int(p.num_experts), num_pairs = int(p.num_pairs);
  for (int i = thread; i < num_experts; i += kPlanThreads) counts[i] = 0;
  __syncthreads();
  const int part = ceil_divide(ceil_divide(num_pairs, kPlanWarps), kWarpSize) * kWarpSize;
  const int begin = min(warp * part, num_pairs), end = min(begin + part, num_pairs);
  int mine = 0;
  for (int first = begin; first < end; first += kWarpSize) {
    const int id = first + lane < end ? p.ids[first + lane] : -1;
    if (id >= 0 && id < num_experts) atomicAdd(&counts[id], 1);
    mine += __popc(__ballot_sync(kAllLanes, id == expert));
  }
  if (lane == 0) own[warp] = mine;
  __syncthreads();
  int pairs_before = 0, tiles_before = 0;  // of lower experts
  for (int i = thread; i < expert; i += kPlanThreads) {
    pairs_before += counts[i];
    tiles_before += ceil_divide(counts[i], tile_pairs);
  }
  pairs_before = block_reduce(pairs_before, Add(), scratch);
  tiles_before = block_reduce(tiles_before, Add(), scratch);
  const int count = counts[expert], num_tiles = ceil_divide(count, tile_pairs);
  auto* tiles = reinterpret_cast<uint4*>(p.tiles);
  if (expert == num_experts - 1 && thread == 0) {
    tiles[0] = uint4{uint32_t(tiles_before + num_tiles), 0, 0, 0};
  }
  for (int i = thread; i < num_tiles; i += kPlanThreads) {
    const int first = i * tile_pairs;
    tiles[1 + tiles_before + i] = uint4{uint32_t(expert), uint32_t(pairs_before + first),
                                        uint32_t(min(tile_pairs, count - first)), 0};
  }
  int place = pairs_before;
  for (int other = 0; other < warp; ++other) place += own[other];
  if (mine == 0) return;
  for (int first = begin; first < end; first += kWarpSize) {
    const int id = first + lane < end ? p.ids[first + lane] : -1;
    const uint32_t all = __ballot_sync(kAllLanes, id == expert);
    if (id == expert) p.pairs[place + __popc(all & ((1u << lane) - 1))] = first + lane;
    place += __popc(all);
  }
}

}  // namespace

cudaError_t route(const RouteParams& p, cudaStream_t stream) {
  const bool are_experts = 0 < p.num_experts && p.num_experts <= kMaxExperts && 0 < p.num_groups &&
                           p.num_experts % p.num_groups == 0;
  if (!are_experts || p.top_groups < 1 || p.top_groups > p.num_groups || p.top_k < 1 ||
      p.top_k > p.num_experts / p.num_groups * p.top_groups)
    return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_divide<int64_t>(p.num_tokens, kRouteWarps)));
  const size_t shared_bytes = size_t(kRouteWarps * 3 * p.num_experts) * sizeof(float);
  return launch_dependent(route_kernel, grid, dim3(kRouteWarps * kWarpSize), shared_bytes, stream,
                          p);
}

int64_t experts_max_tiles(int64_t num_pairs, int64_t num_experts, bool is_streamed) {
  const int64_t size = tile_pairs_of(num_pairs, num_experts, is_streamed);
  return min(num_pairs, (num_pairs + min(num_pairs, num_experts) * (size - 1)) / size);
}

cudaError_t experts_plan(const ExpertsPlanParams& p, cudaStream_t stream) {
  if (p.num_experts < 1 || p.num_experts > kMaxExperts || p.num_pairs > INT32_MAX)
    return cudaErrorInvalidValue;
  const auto size = int(tile_pairs_of(p.num_pairs, p.num_experts, p.is_streamed != 0));
  return launch_dependent(experts_plan_kernel, dim3(unsigned(p.num_experts)), dim3(kPlanThreads), 0,
                          stream, p, size);
}

}  // namespace tgi::cuda
