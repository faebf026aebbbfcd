// Adds a product's rows to the residual stream, where neither cuBLAS nor the product's kernel does.
// One load of each operand per thread: the latency of launching and of memory decides the time.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) residual_add_kernel(ResidualAddParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t place = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8;
  if (place >= p.num_elements) return;
  float added[8], x[8];
  load8(static_cast<const Element*>(p.rows) + place, added);
  load8(p.x + place, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = fmaf(p.factor, added[i], x[i]);
  store8(p.x + place, x);
}

}  // namespace

cudaError_t residual_add(const ResidualAddParams& p, cudaStream_t stream) {
  if (p.num_elements % 8 != 0) return cudaErrorInvalidValue;
  if (p.num_elements == 0) return cudaSuccess;
  const auto blocks = unsigned(ceil_divide<int64_t>(p.num_elements, 8 * kThreads));
  const auto kernel =
      p.type == Type::kBfloat16 ? residual_add_kernel<bf16> : residual_add_kernel<fp16>;
  return launch_dependent(kernel, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
