// Products of bfloat16 activations with quantised weights.
#include "quant_linear.cuh"

namespace tgi::cuda {

template cudaError_t quant_linear_of<bf16>(const QuantLinearParams&, cudaStream_t);

}  // namespace tgi::cuda
