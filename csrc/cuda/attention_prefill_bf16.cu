// Prefill attention in bfloat16.
#include "attention_prefill.cuh"

namespace tgi::cuda {

template cudaError_t launch_prefill<bf16, bf16>(const AttentionParams&, cudaStream_t);

}  // namespace tgi::cuda
