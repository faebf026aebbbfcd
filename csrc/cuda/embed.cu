// Gathers rows of the embedding table into the residual.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) embed_kernel(EmbedParams p) {
  wait_for_kernel_before();
  start_kernel_after();
  const int64_t vectors = p.hidden / 8;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.num_tokens * vectors) return;
  const int64_t token = i / vectors, column = i % vectors * 8;
  const int64_t id = min(max(int64_t{p.ids[token]}, int64_t{0}), p.num_rows - 1);
  float x[8];
  load8(static_cast<const Element*>(p.table) + id * p.hidden + column, x);
  store8(p.out + token * p.hidden + column, x);
}

}  // namespace

cudaError_t embed(const EmbedParams& p, cudaStream_t stream) {
  if (p.hidden % 8 != 0 || p.num_rows < 1) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const auto blocks = unsigned(ceil_divide<int64_t>(p.num_tokens * (p.hidden / 8), kThreads));
  const auto kernel = p.type == Type::kBfloat16 ? embed_kernel<bf16> : embed_kernel<fp16>;
  return launch_dependent(kernel, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
