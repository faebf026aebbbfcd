// The codes of quantised weights, unpacked to float: integers of 4 or 8 bits, or E4M3 floats. They
// are in column order and are read 16 bytes at a time.
#pragma once

#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {

// Converts an integer below 2^23 to float by making it the mantissa of 2^23. A conversion
// instruction takes four times as long.
constexpr uint32_t kMagicBits = 0x4B000000u;
constexpr float kMagic = 8388608.0f;

template <int Bits>
struct Integers {
  static constexpr int kBits = Bits;

  // Unpacks codes 8 i to 8 i + 7 of 16 bytes, minus `shift` (kMagic and the zero point).
  static __device__ __forceinline__ void unpack(const uint4& bytes, int i, float shift,
                                                float (&out)[8]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int bit = (8 * i + k) * Bits;
      const uint32_t code = words[bit / 32] >> (bit % 32) & ((1u << Bits) - 1);
      out[k] = __uint_as_float(kMagicBits | code) - shift;
    }
  }
};

struct Floats {
  static constexpr int kBits = 8;

  static __device__ __forceinline__ void unpack(const uint4& bytes, int i, float, float (&out)[8]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t word = words[2 * i + k / 2] >> (k % 2 * 16);
      const float2 pair = Pair<fp8>::unpack(uint16_t(word));
      out[2 * k] = pair.x;
      out[2 * k + 1] = pair.y;
    }
  }
};

// Columns that a lane processes at a time: 16 bytes of codes.
template <typename Code>
constexpr int kStep = 128 / Code::kBits;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(fp16 x) { return Pair<fp16>::unpack(x.bits).x; }

// Returns whether the kernels can read a matrix: a lane's 16 bytes of codes are in one group.
inline bool are_codes_valid(const QuantMatrix& m) {
  const int64_t step = m.bits == 4 ? 32 : 16;
  if (m.has_float_codes && (m.bits != 8 || !m.has_wide_scales)) return false;
  return (m.bits == 4 || m.bits == 8) && m.group > 0 && m.group % step == 0 &&
         m.num_columns % m.group == 0;
}

// Calls body with the types of a matrix's scales and codes.
template <typename Body>
cudaError_t for_codes(const QuantMatrix& m, const Body& body) {
  const auto with_bits = [&](auto scale) {
    return m.bits == 4 ? body(scale, Integers<4>()) : body(scale, Integers<8>());
  };
  if (m.has_float_codes) return body(float(), Floats());
  return m.has_wide_scales ? with_bits(float()) : with_bits(fp16());
}

}  // namespace tgi::cuda
