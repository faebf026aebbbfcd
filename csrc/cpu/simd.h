// Sixteen floats, written once for AVX-512, AVX2 and portable C++: kernels are templates over
// nothing, they are compiled once an instruction set. A kernel's file pair:
//
//   softmax_impl.h     #include "simd.h", then the kernel in namespace tgi::cpu::TGI_ISA
//   softmax.cpp        #include "softmax_impl.h": the portable variant, and the function that
//   chooses softmax_avx2.cpp   #include "target_avx2.h" first, then "softmax_impl.h";
//   softmax_avx512.cpp alike
//
// Everything here is in an unnamed namespace and every standard header comes before the target
// pragma, so that no AVX-512 copy of a shared inline function can reach a machine without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

#if !defined(TGI_ISA)
#define TGI_ISA portable
#endif

namespace tgi::cpu::TGI_ISA {
namespace {

#if defined(TGI_AVX512)

struct Vec {
  __m512 v;
};

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}
inline Vec load_first(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline void store_first(float* p, Vec a, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
inline Vec keep_first(Vec a, int64_t n, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(n), a.v)};
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
// Bit i: a[i] <= b[i]; false where either is NaN.
inline uint32_t less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
// a where a <= b, else 0.
inline Vec zero_above(Vec a, Vec test, Vec limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test.v, limit.v, _CMP_LE_OQ), a.v)};
}
// 2^x for x <= 127; 0 below -126 and at -infinity; NaN stays.
inline Vec exp2(Vec x) {
  const __m512 whole = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(p, whole)};
}
// 32 bfloat16 as two vectors: those at even and those at odd places.
inline void load_pairs(const uint16_t* p, Vec& even, Vec& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
}

#elif defined(TGI_AVX2)

struct Vec {
  __m256 v[2];
};

inline Vec splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline Vec load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
inline Vec operator+(Vec a, Vec b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
inline Vec operator-(Vec a, Vec b) {
  return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
inline Vec operator*(Vec a, Vec b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
inline Vec operator/(Vec a, Vec b) {
  return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
inline Vec max(Vec a, Vec b) {
  return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
}
inline float reduce_max(Vec a) {
  const __m256 eight = _mm256_max_ps(a.v[0], a.v[1]);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(a.v[0], a.v[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline uint32_t less_equal(Vec a, Vec b) {
  const auto low = uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v[0], b.v[0], _CMP_LE_OQ)));
  const auto high = uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v[1], b.v[1], _CMP_LE_OQ)));
  return low | high << 8;
}
inline Vec zero_above(Vec a, Vec test, Vec limit) {
  return {{_mm256_and_ps(a.v[0], _mm256_cmp_ps(test.v[0], limit.v[0], _CMP_LE_OQ)),
           _mm256_and_ps(a.v[1], _mm256_cmp_ps(test.v[1], limit.v[1], _CMP_LE_OQ))}};
}
inline __m256 exp2_half(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-126.0f);
  // The operand order of max and min lets NaN through.
  const __m256 y = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(lowest, x));
  const __m256 whole = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(y, whole);
  __m256 p = _mm256_set1_ps(1.535336188319500e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.339887440266574e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618437357674640e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550332471162809e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402264791363012e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931472028550421e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  const __m256 is_tiny = _mm256_cmp_ps(x, lowest, _CMP_LT_OQ);
  return _mm256_andnot_ps(is_tiny, _mm256_mul_ps(p, power));
}
inline Vec exp2(Vec x) { return {{exp2_half(x.v[0]), exp2_half(x.v[1])}}; }
inline void load_pairs(const uint16_t* p, Vec& even, Vec& odd) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
  for (int half = 0; half < 2; ++half) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + half);
    even.v[half] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd.v[half] = _mm256_castsi256_ps(_mm256_and_si256(both, high));
  }
}

#else

// Four by four: 16 bytes are native on SSE2 and NEON alike.
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInt __attribute__((vector_size(16)));

struct Vec {
  Quad v[4];
};

template <typename Function>
inline Vec each(const Function& function) {
  return {{function(0), function(1), function(2), function(3)}};
}

inline Vec splat(float x) {
  return each([=](int) { return Quad{x, x, x, x}; });
}
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }
inline Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b,
               Vec c) {  // two roundings: a fused one is a library call on plain x86-64
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline float reduce_max(Vec a) {
  float result = a.v[0][0];
  for (int i = 1; i < 16; ++i) {
    const float x = a.v[i / 4][i % 4];
    result = result > x ? result : x;
  }
  return result;
}
inline float reduce_add(Vec a) {
  const Quad sum = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
inline uint32_t less_equal(Vec a, Vec b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t(a.v[i / 4][i % 4] <= b.v[i / 4][i % 4]) << i;
  return bits;
}
inline Vec zero_above(Vec a, Vec test, Vec limit) {
  return each([&](int i) { return test.v[i] <= limit.v[i] ? a.v[i] : Quad{}; });
}
inline Vec exp2(Vec x) {
  return each([&](int i) {
    const Quad lowest = {-126.0f, -126.0f, -126.0f, -126.0f};
    const Quad highest = {128.0f, 128.0f, 128.0f, 128.0f};
    Quad y = x.v[i] < lowest ? lowest : x.v[i];
    y = y > highest ? highest : y;
    // Adding 1.5 * 2^23 rounds to the nearest whole number.
    const Quad magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
    const Quad whole = (y + magic) - magic;
    const Quad f = y - whole;
    Quad p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const QuadInt exponent = (__builtin_convertvector(whole, QuadInt) + 127) << 23;
    Quad power;
    std::memcpy(&power, &exponent, sizeof(power));
    return x.v[i] < lowest ? Quad{} : p * power;
  });
}
inline void load_pairs(const uint16_t* p, Vec& even, Vec& odd) {
  uint32_t words[16], low[16], high[16];
  std::memcpy(words, p, sizeof(words));
  for (int i = 0; i < 16; ++i) {
    low[i] = words[i] << 16;
    high[i] = words[i] & 0xffff0000u;
  }
  std::memcpy(&even, low, sizeof(even));
  std::memcpy(&odd, high, sizeof(odd));
}

#endif

#if !defined(TGI_AVX512)
inline Vec load_first(const float* p, int64_t n) {
  float lanes[16] = {};
  std::memcpy(lanes, p, size_t(n < 16 ? n : 16) * sizeof(float));
  return load(lanes);
}
inline void store_first(float* p, Vec a, int64_t n) {
  float lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, size_t(n < 16 ? n : 16) * sizeof(float));
}
// The first n lanes of a, and `fill` in the others.
inline Vec keep_first(Vec a, int64_t n, float fill) {
  float lanes[16];
  store(lanes, a);
  for (int64_t i = n; i < 16; ++i) lanes[i] = fill;
  return load(lanes);
}
#endif

constexpr float kLog2e = 1.44269504088896341f;

// e^x; relative error about 1e-7 * (1 + |x| / 2).
inline Vec exp(Vec x) { return exp2(x * splat(kLog2e)); }

inline float from_bfloat16(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof(x));
  return x;
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  if ((word & 0x7fffffffu) > 0x7f800000u) return uint16_t(word >> 16 | 0x40u);
  return uint16_t((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

}  // namespace
}  // namespace tgi::cpu::TGI_ISA
