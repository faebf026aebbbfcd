// The activation between the products of an MLP: f(gate) * up, or only f(x) without a gate.
#include "activation.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) activate_kernel(ActivateParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const int64_t column = int64_t{(blockIdx.y * kThreads + threadIdx.x) * 8};
  if (column >= p.intermediate) return;
  const Element* row =
      static_cast<const Element*>(p.x) + token * (p.is_gated ? 2 : 1) * p.intermediate;
  float x[8], up[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  load8(row + column, x);
  if (p.is_gated) load8(row + p.intermediate + column, up);
#pragma unroll
  for (int k = 0; k < 8; ++k) up[k] *= activate(x[k], p.activation, p.above, p.below);
  store8(static_cast<Element*>(p.out) + token * p.intermediate + column, up);
}

}  // namespace

cudaError_t activate(const ActivateParams& p, cudaStream_t stream) {
  if (p.intermediate % 8 != 0) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_tokens),
                  unsigned(ceil_divide<int64_t>(p.intermediate / 8, kThreads)));
  const auto kernel = p.type == Type::kBfloat16 ? activate_kernel<bf16> : activate_kernel<fp16>;
  return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
