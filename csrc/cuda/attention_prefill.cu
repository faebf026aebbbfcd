// Prefill attention: the choice of kernel. Each type has its own file.
#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {

template <typename Element, typename KvElement>
cudaError_t launch_prefill(const AttentionParams& p, cudaStream_t stream);

cudaError_t attention_prefill(const AttentionParams& p, cudaStream_t stream) {
  const bool fits = p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0 && p.block_size > 0 &&
                    p.num_sequences <= 65535 && p.scale > 0 && p.key_scale > 0;
  if (!fits || (p.kv_type != p.type && p.kv_type != Type::kFloat8)) return cudaErrorInvalidValue;
  if (p.num_sequences == 0 || p.max_query_len == 0) return cudaSuccess;
  if (p.type == Type::kBfloat16) {
    return p.kv_type == p.type ? launch_prefill<bf16, bf16>(p, stream)
                               : launch_prefill<bf16, fp8>(p, stream);
  }
  return p.kv_type == p.type ? launch_prefill<fp16, fp16>(p, stream)
                             : launch_prefill<fp16, fp8>(p, stream);
}

}  // namespace tgi::cuda
