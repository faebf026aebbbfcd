// Decode attention: the plan that the layers of a step share, and the choice of kernel. Each type
// has its own file, because five head sizes take nvcc seconds.
#include "attention_context.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kPlanThreads = kWarpSize;
constexpr int64_t kMaxGroup = 16;  // query heads per KV head: the rows of mma

// One warp computes the running count of chunks before each sequence.
__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(AttentionParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = int(threadIdx.x);
  int32_t total = 0;
  for (int64_t first = 0; first < p.num_sequences; first += kWarpSize) {
    const int64_t sequence = first + lane;
    const auto own =
        int32_t(sequence < p.num_sequences ? Context(p, p.context_len[sequence]).num_chunks() : 0);
    int32_t before = own;  // including own, within this round
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, before, lanes);
      if (lane >= lanes) before += other;
    }
    if (sequence < p.num_sequences) p.plan[sequence + 1] = total + before;
    total += __shfl_sync(kAllLanes, before, kWarpSize - 1);
  }
  if (lane == 0) p.plan[0] = 0;
}

}  // namespace

int64_t attention_workspace_bytes(int64_t num_sequences, int64_t block_table_stride,
                                  int64_t block_size, int64_t num_heads, int64_t head_dim) {
  const int64_t chunks = num_sequences * max_chunks(block_table_stride * block_size);
  return chunks * num_heads * (head_dim + 2) * 4;
}

cudaError_t attention_plan(const AttentionParams& p, cudaStream_t stream) {
  if (p.num_sequences == 0) return cudaSuccess;
  return launch_dependent(plan_kernel, dim3(1), dim3(kPlanThreads), 0, stream, p);
}

cudaError_t attention_decode(const AttentionParams& p, cudaStream_t stream) {
  const bool fits = p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
                    p.num_heads / p.num_kv_heads <= kMaxGroup && p.block_size % 16 == 0;
  if (!fits || (p.kv_type != p.type && p.kv_type != Type::kFloat8)) return cudaErrorInvalidValue;
  if (p.num_sequences == 0) return cudaSuccess;
  if (p.type == Type::kBfloat16) {
    return p.kv_type == p.type ? launch_decode<bf16, bf16>(p, stream)
                               : launch_decode<bf16, fp8>(p, stream);
  }
  return p.kv_type == p.type ? launch_decode<fp16, fp16>(p, stream)
                             : launch_decode<fp16, fp8>(p, stream);
}

}  // namespace tgi::cuda
