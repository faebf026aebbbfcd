// The CPU kernels: raw pointers, and a [begin, end) range of the parallel axis; threads are the
// caller's. Each function here chooses the variant for the instruction set in use.
#pragma once

#include <cstdint>

#include "params.h"

namespace tgi::cpu {

// Tokens [begin, end).
void embed(const ::tgi::EmbedParams& p, int64_t begin, int64_t end);
void rms_norm(const ::tgi::RmsNormParams& p, int64_t begin, int64_t end);
void rope_kv_write(const ::tgi::RopeParams& p, int64_t begin, int64_t end);
void act_mul(const ::tgi::ActMulParams& p, int64_t begin, int64_t end);

// Decodes [begin, end) blocks of a weight format into float32; false if there is no such format.
bool dequantise(const char* format, const uint8_t* blocks, float* out, int64_t begin, int64_t end);
// Elements and bytes of a block; false if there is no such format.
bool format_block(const char* format, int64_t* elements, int64_t* bytes);

}  // namespace tgi::cpu

// Declares a kernel over a range in the namespace of each instruction set.
#define TGI_DECLARE_VARIANTS(name, Params)                       \
  namespace tgi::cpu::portable {                                 \
  void name(const ::tgi::Params& p, int64_t begin, int64_t end); \
  }                                                              \
  namespace tgi::cpu::avx2 {                                     \
  void name(const ::tgi::Params& p, int64_t begin, int64_t end); \
  }                                                              \
  namespace tgi::cpu::avx512 {                                   \
  void name(const ::tgi::Params& p, int64_t begin, int64_t end); \
  }
