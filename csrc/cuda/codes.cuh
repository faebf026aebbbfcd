// The codes of quantised weights: integers of 4 or 8 bits, or floats, E4M3 or E2M1. They are in
// column order and are read 16 bytes at a time.
#pragma once

#include <type_traits>

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

#ifdef __CUDACC__

// Returns the four bytes of a and b, numbered 0 to 7, that the selector's nibbles name.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Multiplies two pairs of elements, rounding each product once.
template <typename Element>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  using Two = std::conditional_t<std::is_same_v<Element, bf16>, __nv_bfloat162, __half2>;
  const Two product = __hmul2(*reinterpret_cast<const Two*>(&a), *reinterpret_cast<const Two*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}

#else

inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) {
    const uint32_t place = selector >> (i / 2) & 7;
    out |= ((place < 4 ? a : b) >> (place % 4 * 8) & 0xffu) << i;
  }
  return out;
}

template <typename Element>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const float2 first = Pair<Element>::unpack(a), second = Pair<Element>::unpack(b);
  return Pair<Element>::pack(first.x * second.x, first.y * second.y);
}

#endif

// The scale of E2M1 codes: an exponent, of 2^(bits - 127).
struct e8m0 {
  uint8_t bits;
};

// Returns half of the scale, which is finite for all exponents; 2^-128 and 2^-127 are denormal.
__device__ __forceinline__ float to_float(e8m0 x) {
  const uint32_t e = x.bits;
  return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}

// E2M1 floats: a sign, two bits of exponent and one of mantissa. In the lowest bits of exponent and
// the highest of mantissa of a wider type, the same three bits are the value times a power of two,
// also if it is the denormal 0.5. They are read as twice their value, since scales are halved.
struct E2M1 {
  static constexpr int kBits = 4;

  // Where a type has the bits, and what makes twice their value of them.
  template <typename Element>
  struct Layout {
    static constexpr bool kIsBfloat16 = std::is_same_v<Element, bf16>;
    static constexpr int kShift = kIsBfloat16 ? 6 : 3;  // from the top
    static constexpr uint32_t kMask = 0x70007000u >> kShift;
    static constexpr uint32_t kFactor = kIsBfloat16 ? 0x7f007f00u : 0x78007800u;  // 2^127, or 2^15
  };

  // Returns codes 2k and 2k + 1 of eight as elements, without the factor.
  template <typename Element>
  static __device__ __forceinline__ uint32_t pair(uint32_t codes, int k) {
    using L = Layout<Element>;
    // Byte k has both. They are moved to the top of the halves; what is below them is masked.
    const uint32_t top = pick_bytes(codes << 4, codes, 0x4400u + 0x1111u * unsigned(k));
    return (top & 0x80008000u) | (top >> L::kShift & L::kMask);
  }

  static __device__ __forceinline__ void unpack(const uint4& bytes, int i, float, float (&out)[8]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = Pair<bf16>::unpack(pair<bf16>(words[i], k));
      out[2 * k] = two.x * 0x1p127f;
      out[2 * k + 1] = two.y * 0x1p127f;
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
  const bool is_e2m1 = m.bits == 4 && !m.has_wide_scales && m.offsets == nullptr;
  const bool is_e4m3 = m.bits == 8 && m.has_wide_scales;
  if (m.has_float_codes && !is_e2m1 && !is_e4m3) return false;
  return (m.bits == 4 || m.bits == 8) && m.group > 0 && m.group % step == 0 &&
         m.num_columns % m.group == 0;
}

// Calls body with the types of a matrix's scales and codes.
template <typename Body>
cudaError_t for_codes(const QuantMatrix& m, const Body& body) {
  const auto with_bits = [&](auto scale) {
    return m.bits == 4 ? body(scale, Integers<4>()) : body(scale, Integers<8>());
  };
  if (m.has_float_codes) return m.bits == 4 ? body(e8m0(), E2M1()) : body(float(), Floats());
  return m.has_wide_scales ? with_bits(float()) : with_bits(fp16());
}

}  // namespace tgi::cuda
