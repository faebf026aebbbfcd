// Routed experts beside their products' kernels: which of those a product uses, the weighted sum of
// a token's experts, and the sum with a gated shared expert.
#include "experts.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 128;

// A block's threads share a token's columns. A pair's rows are added in the order of the experts,
// whatever the order in which they were computed.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 8) experts_sum_kernel(ExpertsSumParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 8;
  if (column >= p.hidden) return;
  const auto* row = static_cast<const Element*>(p.rows) + token * p.top_k * p.hidden + column;
  float sum[8] = {};
  for (int64_t pair = token * p.top_k; pair < (token + 1) * p.top_k; ++pair, row += p.hidden) {
    const int32_t id = p.ids[pair];
    if (id < 0 || id >= p.num_experts) continue;
    const float weight = p.weights[pair];
    float values[8];
    load8(row, values);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = fmaf(weight, values[k], sum[k]);
  }
  float* x = p.x + token * p.hidden + column;
  float values[8];
  load8(x, values);
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = fmaf(p.factor, sum[k], values[k]);
  store8(x, values);
}

__global__ void __launch_bounds__(kThreads, 8) gated_add_kernel(GatedAddParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 4;
  if (column >= p.hidden) return;
  const float factor = p.factor * __fdividef(1.0f, 1.0f + expf(-p.gate[token]));
  const int64_t place = token * p.hidden + column;
  const float4 row = *reinterpret_cast<const float4*>(p.rows + place);
  float4* x = reinterpret_cast<float4*>(p.x + place);
  const float4 old = *x;
  *x = float4{fmaf(factor, row.x, old.x), fmaf(factor, row.y, old.y), fmaf(factor, row.z, old.z),
              fmaf(factor, row.w, old.w)};
}

}  // namespace

cudaError_t experts_product(const ExpertsProductParams& p, cudaStream_t stream) {
  const bool is_plain = p.weight.bits == 16 && p.weight.num_columns % 8 == 0;
  const bool are_sizes_valid = p.num_experts > 0 && p.pairs_per_row > 0 &&
                               p.weight.num_rows % (p.num_experts * (p.is_gated ? 16 : 8)) == 0;
  if (!(is_plain || are_codes_valid(p.weight)) || !are_sizes_valid) return cudaErrorInvalidValue;
  // LaneRows has offsets of 32 bits.
  const int64_t size_of_expert = p.weight.num_rows / p.num_experts * p.weight.num_columns;
  const int64_t num_groups =
      is_plain ? 0 : p.weight.scale_stride * (p.weight.num_columns / p.weight.group);
  if (size_of_expert >= 1 << 29 || num_groups >= int64_t{1} << 31) return cudaErrorInvalidValue;
  if (p.num_pairs == 0 || p.weight.num_rows == 0) return cudaSuccess;
  const int64_t tile = tile_pairs_of(p.num_pairs, p.num_experts, p.is_streamed != 0);
  return tile <= kMaxStreamedPairs ? experts_stream(p, stream) : experts_tile(p, stream);
}

cudaError_t experts_sum(const ExpertsSumParams& p, cudaStream_t stream) {
  if (p.hidden % 8 != 0) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_tokens), unsigned(ceil_divide<int64_t>(p.hidden, 8 * kThreads)));
  const auto kernel =
      p.type == Type::kBfloat16 ? experts_sum_kernel<bf16> : experts_sum_kernel<fp16>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

cudaError_t gated_add(const GatedAddParams& p, cudaStream_t stream) {
  if (p.hidden % 4 != 0) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_tokens), unsigned(ceil_divide<int64_t>(p.hidden, 4 * kThreads)));
  return launch_dependent(gated_add_kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
