// A flat function an operator, for ctypes. Not instrumented: it runs outside of kernels.
#include "kernels.h"

#define OPERATOR(name, Params)                                                           \
  extern "C" __attribute__((visibility("default"))) int emu_##name(const void* params) { \
    return tgi::cuda::name(*static_cast<const tgi::cuda::Params*>(params), nullptr);     \
  }                                                                                      \
  extern "C" __attribute__((visibility("default"))) size_t emu_size_##name() {           \
    return sizeof(tgi::cuda::Params);                                                    \
  }

OPERATOR(embed, EmbedParams)
OPERATOR(rms_norm, RmsNormParams)
OPERATOR(act_mul, ActMulParams)
OPERATOR(rope_kv_write, RopeParams)
