// The codes of quantised weights: integers of 4 or 8 bits, or floats, E4M3 or E2M1. They are read
// 16 bytes at a time. Codes of 8 bits are in column order. A word has codes 0 to 7 of 4 bits so
// that two neighbours lie 16 bits apart, and a shift and a mask make a pair of elements of them:
//
//   bits    31 .. 28  27 .. 24  23 .. 20  19 .. 16  15 .. 12  11 .. 8   7 .. 4    3 .. 0
//   codes   7         5         3         1         6         4         2         0
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.cuh"

namespace tgi::cuda {

#ifdef __CUDACC__

// Returns the four bytes of a and b, numbered 0 to 7, that the selector's nibbles name.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

template <typename Element>
using Two = std::conditional_t<std::is_same_v<Element, bf16>, __nv_bfloat162, __half2>;

// Multiplies two pairs of elements, rounding each product once.
template <typename Element>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const auto product = __hmul2(*reinterpret_cast<const Two<Element>*>(&a),
                               *reinterpret_cast<const Two<Element>*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// Subtracts the elements of b from those of a, rounding each difference once.
template <typename Element>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  const auto difference = __hsub2(*reinterpret_cast<const Two<Element>*>(&a),
                                  *reinterpret_cast<const Two<Element>*>(&b));
  return *reinterpret_cast<const uint32_t*>(&difference);
}

// Returns (x & kMask) | kOthers, for which the compiler takes two instructions.
template <uint32_t kMask, uint32_t kOthers>
__device__ __forceinline__ uint32_t mask_and_set(uint32_t x) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(out) : "r"(x), "n"(kMask), "n"(kOthers));
  return out;
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

template <uint32_t kMask, uint32_t kOthers>
uint32_t mask_and_set(uint32_t x) {
  return (x & kMask) | kOthers;
}

template <typename Element>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const float2 first = Pair<Element>::unpack(a), second = Pair<Element>::unpack(b);
  return Pair<Element>::pack(first.x * second.x, first.y * second.y);
}

template <typename Element>
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  const float2 first = Pair<Element>::unpack(a), second = Pair<Element>::unpack(b);
  return Pair<Element>::pack(first.x - second.x, first.y - second.y);
}

#endif

// Converts an integer below 2^23 to float by making it the mantissa of 2^23. A conversion
// instruction takes four times as long.
constexpr uint32_t kMagicBits = 0x4B000000u;
constexpr float kMagic = 8388608.0f;

// Each type of codes has `unpack`, of 16 bytes to floats, and `operands`, of a word to exact
// elements for mma: its pairs of codes in column order.

template <int Bits>
struct Integers {
  static constexpr int kBits = Bits;
  static constexpr int kPairs = 16 / Bits;   // of a word
  static constexpr bool kHasOffsets = true;  // their groups may have
  static constexpr int kLongRun = Bits == 4 ? 4 : 2;

  // Whether codes become the mantissas of elements: 7 bits hold 4, and 10 bits hold 8.
  template <typename Element>
  static constexpr bool kIsMantissa = Bits == 4 || std::is_same_v<Element, fp16>;
  template <typename Element>
  static constexpr uint32_t kOneBits = std::is_same_v<Element, bf16> ? 0x43004300u : 0x64006400u;

  // Operands are `base` more than the code minus the zero point: 128, the bfloat16 with an empty
  // mantissa whose last bit is 1, and the zero point. Subtracting it from each would be a third of
  // all instructions. A sum of products then rounds like one that is 30 times as large, which is
  // still less than the activations' own rounding; with 1024, which float16 has, it would not be.
  template <typename Element>
  static constexpr bool kHasBase = Bits == 4 && std::is_same_v<Element, bf16>;
  template <typename Element>
  static __device__ __forceinline__ float base(int zero) {
    return kHasBase<Element> ? 128.0f + float(zero) : 0.0f;
  }

  // What `operands` subtracts: 1024, or kMagic, and the zero point.
  template <typename Element>
  static __device__ __forceinline__ uint32_t shift(int zero) {
    if constexpr (!kIsMantissa<Element>) return __float_as_uint(kMagic + float(zero));
    const float one = 1024.0f + float(zero);
    return Pair<Element>::pack(one, one);
  }

  template <typename Element>
  static __device__ __forceinline__ void operands(uint32_t word, uint32_t shift,
                                                  uint32_t (&out)[kPairs]) {
    // A code at bit 4 is a mantissa of 64, whose bit 4 is 1, so that it is `shift` less 1024 - 64.
    const uint32_t upper_shift = Bits == 4 ? subtract_pairs<Element>(shift, 0x63806380u) : 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if constexpr (kHasBase<Element>) {
        out[i] = mask_and_set<0x000f000fu, kOneBits<Element>>(word >> 4 * i);
      } else if constexpr (Bits == 4) {  // 10 bits of mantissa hold either of two codes
        const uint32_t pairs = word >> i / 2 * 8;
        const uint32_t lower = mask_and_set<0x000f000fu, kOneBits<Element>>(pairs);
        const uint32_t upper = mask_and_set<0x00f000f0u, 0x54005400u>(pairs);
        out[i] = i % 2 == 0 ? subtract_pairs<Element>(lower, shift)
                            : subtract_pairs<Element>(upper, upper_shift);
      } else if constexpr (kIsMantissa<Element>) {
        const uint32_t codes = pick_bytes(word, kOneBits<Element>, i == 0 ? 0x5150u : 0x5352u);
        out[i] = subtract_pairs<Element>(codes, shift);
      } else {  // of a float with at most 8 significant bits, the upper half is the bfloat16
        uint32_t halves[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t code = pick_bytes(word, kMagicBits, 0x7440u + 2 * i + k);
          halves[k] = __float_as_uint(__uint_as_float(code) - __uint_as_float(shift));
        }
        out[i] = pick_bytes(halves[0], halves[1], 0x7632u);
      }
    }
  }

  // Unpacks codes 8 i to 8 i + 7 of 16 bytes, minus `shift` (kMagic and the zero point).
  static __device__ __forceinline__ void unpack(const uint4& bytes, int i, float shift,
                                                float (&out)[8]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int word = (8 * i + k) * Bits / 32;
      const int bit = Bits == 4 ? k % 2 * 16 + k / 2 * 4 : k % 4 * 8;
      const uint32_t code = words[word] >> bit & ((1u << Bits) - 1);
      out[k] = __uint_as_float(kMagicBits | code) - shift;
    }
  }
};

struct Floats {
  static constexpr int kBits = 8;
  static constexpr int kPairs = 2;
  static constexpr bool kHasOffsets = false;
  static constexpr int kLongRun = 4;
  template <typename Element>
  static constexpr bool kHasBase = false;
  template <typename Element>
  static __device__ __forceinline__ float base(int) {
    return 0;
  }

  template <typename Element>
  static __device__ __forceinline__ uint32_t shift(int) {
    return 0;
  }

  template <typename Element>
  static __device__ __forceinline__ void operands(uint32_t word, uint32_t, uint32_t (&out)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = Pair<fp8>::unpack(uint16_t(word >> 16 * i));
      if constexpr (std::is_same_v<Element, bf16>) {
        out[i] = pick_bytes(__float_as_uint(pair.x), __float_as_uint(pair.y), 0x7632u);
      } else {
        out[i] = Pair<fp16>::pack(pair.x, pair.y);
      }
    }
  }

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
  static constexpr int kPairs = 4;
  static constexpr bool kHasOffsets = false;
  static constexpr int kLongRun = 1;
  template <typename Element>
  static constexpr bool kHasBase = false;
  template <typename Element>
  static __device__ __forceinline__ float base(int) {
    return 0;
  }

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
    const int up = 12 - 4 * k - L::kShift;  // to the places of the mask
    const uint32_t magnitudes = up >= 0 ? codes << (up & 31) : codes >> (-up & 31);
    return (codes << (12 - 4 * k) & 0x80008000u) | (magnitudes & L::kMask);
  }

  template <typename Element>
  static __device__ __forceinline__ uint32_t shift(int) {
    return 0;
  }

  template <typename Element>
  static __device__ __forceinline__ void operands(uint32_t word, uint32_t, uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = multiply_pairs<Element>(pair<Element>(word, i), Layout<Element>::kFactor);
    }
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

// Columns of 16 bytes of codes.
template <typename Code>
constexpr int kStep = 128 / Code::kBits;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(fp16 x) { return Pair<fp16>::unpack(x.bits).x; }

// Returns whether the kernels can read a matrix: 16 bytes of codes are in one group.
inline bool are_codes_valid(const QuantMatrix& m) {
  const int64_t step = m.bits == 4 ? 32 : 16;
  const bool is_float = m.offsets == nullptr && (m.bits == 4) == (m.has_wide_scales == 0);
  if (m.has_float_codes && !is_float) return false;
  if (m.scale_stride < m.num_rows || m.scale_stride % 16 != 0) return false;
  if (m.zero < 0 || m.zero > 128) return false;  // `operands` would round
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
