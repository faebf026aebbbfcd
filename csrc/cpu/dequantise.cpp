// Weight formats to float32, at load. One variant: the file is read once.
// Layouts: ggml's block_q8_0, block_q4_0, block_q4_1 (scales are fp16; element i and i + 16 share a
// byte).
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace tgi::cpu {

namespace {

// Branch-free but for the rare zero, denormal, infinity and NaN.
float from_float16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof(half));
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = half >> 10 & 31u;
  uint32_t mantissa = half & 0x3ffu, word;
  if (exponent == 31) {
    word = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent != 0) {
    word = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float tiny = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&word, &tiny, sizeof(word));
    word |= sign;
  }
  float x;
  std::memcpy(&x, &word, sizeof(x));
  return x;
}

void decode_f32(const uint8_t* block, float* out) { std::memcpy(out, block, sizeof(float)); }

void decode_f16(const uint8_t* block, float* out) { *out = from_float16(block); }

void decode_bf16(const uint8_t* block, float* out) {
  uint16_t bits;
  std::memcpy(&bits, block, sizeof(bits));
  *out = portable::from_bfloat16(bits);
}

void decode_q8_0(const uint8_t* block, float* out) {
  const float scale = from_float16(block);
  for (int i = 0; i < 32; ++i) out[i] = scale * float(int8_t(block[2 + i]));
}

void decode_q4_0(const uint8_t* block, float* out) {
  const float scale = from_float16(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * float(int(block[2 + i] & 15) - 8);
    out[i + 16] = scale * float(int(block[2 + i] >> 4) - 8);
  }
}

void decode_q4_1(const uint8_t* block, float* out) {
  const float scale = from_float16(block), least = from_float16(block + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * float(block[4 + i] & 15) + least;
    out[i + 16] = scale * float(block[4 + i] >> 4) + least;
  }
}

struct Format {
  const char* name;
  int64_t elements;
  int64_t bytes;
  void (*decode)(const uint8_t* block, float* out);
};

constexpr Format kFormats[] = {
    {"F32", 1, 4, decode_f32},     {"F16", 1, 2, decode_f16},     {"BF16", 1, 2, decode_bf16},
    {"Q8_0", 32, 34, decode_q8_0}, {"Q4_0", 32, 18, decode_q4_0}, {"Q4_1", 32, 20, decode_q4_1},
};

const Format* find(const char* name) {
  for (const Format& format : kFormats) {
    if (std::strcmp(format.name, name) == 0) return &format;
  }
  return nullptr;
}

}  // namespace

bool format_block(const char* format, int64_t* elements, int64_t* bytes) {
  const Format* found = find(format);
  if (found == nullptr) return false;
  *elements = found->elements;
  *bytes = found->bytes;
  return true;
}

bool dequantise(const char* format, const uint8_t* blocks, float* out, int64_t begin, int64_t end) {
  const Format* found = find(format);
  if (found == nullptr) return false;
  for (int64_t i = begin; i < end; ++i) {
    found->decode(blocks + i * found->bytes, out + i * found->elements);
  }
  return true;
}

}  // namespace tgi::cpu
