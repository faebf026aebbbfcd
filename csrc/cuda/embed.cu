// Gathers rows of the embedding table into the residual stream.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) embed_kernel(EmbedParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 8;
  if (column >= p.hidden) return;
  const int64_t id = min(max(int64_t{p.ids[token]}, int64_t{0}), p.num_rows - 1);
  float x[8];
  load8(static_cast<const Element*>(p.table) + id * p.hidden + column, x);
  store8(p.out + token * p.hidden + column, x);
}

}  // namespace

cudaError_t embed(const EmbedParams& p, cudaStream_t stream) {
  if (p.hidden % 8 != 0 || p.num_rows < 1) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_tokens), unsigned(ceil_divide<int64_t>(p.hidden / 8, kThreads)));
  const auto kernel = p.type == Type::kBfloat16 ? embed_kernel<bf16> : embed_kernel<fp16>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
