// Decode attention in bfloat16 over a cache of 8 bits.
#include "attention_decode.cuh"

namespace tgi::cuda {

template cudaError_t launch_decode<bf16, fp8>(const AttentionParams&, cudaStream_t);

}  // namespace tgi::cuda
