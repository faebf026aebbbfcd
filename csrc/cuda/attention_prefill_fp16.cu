// Prefill attention in float16.
#include "attention_prefill.cuh"

namespace tgi::cuda {

template cudaError_t launch_prefill<fp16, fp16>(const AttentionParams&, cudaStream_t);

}  // namespace tgi::cuda
