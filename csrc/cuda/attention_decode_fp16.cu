// Decode attention in float16.
#include "attention_decode.cuh"

namespace tgi::cuda {

template cudaError_t launch_decode<fp16, fp16>(const AttentionParams&, cudaStream_t);

}  // namespace tgi::cuda
