// Element types, their conversions, and vectors of 16 bytes.
#pragma once

#include "launch.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace tgi::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // E4M3: no infinity, largest 448
  uint8_t bits;
};

// Converts two adjacent elements to and from float; the first is in the low half.
template <typename Element>
struct Pair;

#ifdef __CUDACC__

template <>
struct Pair<bf16> {
  using Word = uint32_t;
  static __device__ __forceinline__ Word pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const Word*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(Word word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
};

template <>
struct Pair<fp16> {
  using Word = uint32_t;
  static __device__ __forceinline__ Word pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const Word*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(Word word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
};

template <>
struct Pair<fp8> {
  using Word = uint16_t;
  static __device__ __forceinline__ Word pack(float first, float second) {
    return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
  }
  static __device__ __forceinline__ float2 unpack(Word word) {
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(word, __NV_E4M3);
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

#else

namespace emulated {

inline uint16_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float from_fp8(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return NAN;
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float magnitude = exponent == 0 ? std::ldexp(float(mantissa), -9)
                                        : std::ldexp(float(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

inline uint8_t to_fp8(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7f;
  if (magnitude >= 448.0f) return sign | 0x7e;
  const int exponent = std::max(magnitude == 0 ? -6 : std::ilogb(magnitude), -6);
  // units of the last bit
  const int steps = int(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return uint8_t(sign | (exponent == -6 ? steps : steps + 8 * (exponent + 6)));
}

}  // namespace emulated

template <>
struct Pair<bf16> {
  using Word = uint32_t;
  static Word pack(float first, float second) {
    return emulated::to_bf16(first) | uint32_t(emulated::to_bf16(second)) << 16;
  }
  static float2 unpack(Word word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
};

template <>
struct Pair<fp16> {
  using Word = uint32_t;
  static Word pack(float first, float second) {
    return uint32_t(emu::to_bits(_Float16(first)) | emu::to_bits(_Float16(second)) << 16);
  }
  static float2 unpack(Word word) {
    return {float(emu::from_bits<_Float16>(word & 0xffffu)),
            float(emu::from_bits<_Float16>(word >> 16))};
  }
};

template <>
struct Pair<fp8> {
  using Word = uint16_t;
  static Word pack(float first, float second) {
    return Word(emulated::to_fp8(first) | emulated::to_fp8(second) << 8);
  }
  static float2 unpack(Word word) {
    return {emulated::from_fp8(uint8_t(word)), emulated::from_fp8(uint8_t(word >> 8))};
  }
};

#endif

// Load eight consecutive elements: 16-byte aligned if they are 16 or 32 bits wide, 8-byte aligned
// if 8 bits.
__device__ __forceinline__ void load8(const float* p, float (&out)[8]) {
  const float4 first = *reinterpret_cast<const float4*>(p);
  const float4 second = *reinterpret_cast<const float4*>(p + 4);
  out[0] = first.x, out[1] = first.y, out[2] = first.z, out[3] = first.w;
  out[4] = second.x, out[5] = second.y, out[6] = second.z, out[7] = second.w;
}

template <typename Element>
__device__ __forceinline__ void unpack8(uint4 words, float (&out)[8]) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Pair<Element>::unpack(word[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

template <typename Element>
__device__ __forceinline__ void load8(const Element* p, float (&out)[8]) {
  static_assert(sizeof(Element) == 2);
  unpack8<Element>(*reinterpret_cast<const uint4*>(p), out);
}

__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
  *reinterpret_cast<float4*>(p) = float4{x[0], x[1], x[2], x[3]};
  *reinterpret_cast<float4*>(p + 4) = float4{x[4], x[5], x[6], x[7]};
}

template <typename Element>
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  return uint4{Pair<Element>::pack(x[0], x[1]), Pair<Element>::pack(x[2], x[3]),
               Pair<Element>::pack(x[4], x[5]), Pair<Element>::pack(x[6], x[7])};
}

template <typename Element>
__device__ __forceinline__ void store8(Element* p, const float (&x)[8]) {
  static_assert(sizeof(Element) == 2);
  *reinterpret_cast<uint4*>(p) = pack8<Element>(x);
}

}  // namespace tgi::cuda
