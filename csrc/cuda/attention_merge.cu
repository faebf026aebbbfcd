// Merges attention over parts of the keys, each normalised by its own sum, into that over all of
// them: the parts' results, weighted by their sums. The sums come as logarithms.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) merge_parts_kernel(AttentionMergeParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t vectors = p.head_dim / 8;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = divide_narrow(at, vectors), token = divide_narrow(row, p.num_heads);
  const int64_t head = row - token * p.num_heads;
  if (token >= p.num_tokens) return;
  float largest = -INFINITY;
  for (int part = 0; part < p.num_parts; ++part) {
    largest = fmaxf(largest, p.lses[part][head * p.lse_strides[part] + token]);
  }
  float merged[8] = {}, sum = 0;
  for (int part = 0; part < p.num_parts; ++part) {
    float x[8];
    load8(static_cast<const Element*>(p.parts[part]) + at * 8, x);
    const float weight = expf(p.lses[part][head * p.lse_strides[part] + token] - largest);
    sum += weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) merged[i] = fmaf(weight, x[i], merged[i]);
  }
  const float factor = __fdividef(p.value_scale, sum);
#pragma unroll
  for (int i = 0; i < 8; ++i) merged[i] *= factor;
  store8(static_cast<Element*>(p.out) + at * 8, merged);
}

}  // namespace

cudaError_t attention_merge(const AttentionMergeParams& p, cudaStream_t stream) {
  const int64_t vectors = p.num_tokens * p.num_heads * (p.head_dim / 8);
  const bool fits = p.head_dim % 8 == 0 && p.num_parts >= 1 && p.num_parts <= kMaxMergedParts &&
                    vectors < int64_t{1} << 32;
  if (!fits) return cudaErrorInvalidValue;
  if (vectors == 0) return cudaSuccess;
  const auto blocks = unsigned(ceil_divide<int64_t>(vectors, kThreads));
  const auto kernel =
      p.type == Type::kBfloat16 ? merge_parts_kernel<bf16> : merge_parts_kernel<fp16>;
  return launch_dependent(kernel, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
