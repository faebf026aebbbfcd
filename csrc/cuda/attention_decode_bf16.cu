// Decode attention in bfloat16.
#include "attention_decode.cuh"

namespace tgi::cuda {

template cudaError_t launch_decode<bf16, bf16>(const AttentionParams&, cudaStream_t);

}  // namespace tgi::cuda
