// Sixteen lanes in two AVX2 registers; see simd_avx512.h. Included only after a `#pragma GCC
// target` that enables AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "set_sizes.h"

#define TGI_PRAGMA(text) _Pragma(#text)
#define TGI_UNROLL(times) TGI_PRAGMA(GCC unroll times)

namespace tgi::cpu::step {
namespace {

struct Avx2 : SetSizes {
  static constexpr int kNumRegisters = 8;  // of sixteen lanes
  static constexpr const char* kArithmetic = "fma";
#if defined(TGI_HAS_AVX_VNNI)
  static constexpr bool kHasVnni = true;
#else
  static constexpr bool kHasVnni = false;
#endif
  static constexpr bool kHasSignedDot = !kHasVnni;  // takes half of dot's instructions
  static constexpr bool kHasShortSums = !kHasVnni;
  // For six tokens, the accumulators of both panels would need 24 registers, and there are 16. One
  // panel needs 12. Relative to both panels at once, products of codes then take 0.91 to 0.98 of
  // the time and float32 0.67; bf16, whose sums are the longest chains, takes 1.3 times as long
  // (Zen 4, codes without VNNI; with VNNI this is not measured).
  static constexpr int paired_tokens(Precision precision) {
    const bool is_paired =
        precision == Precision::kBF16 || (precision == Precision::kInt8 && kHasVnni);
    return is_paired ? kGroupTokens : 2;
  }
  struct F {
    __m256 a, b;  // lanes 0-7, 8-15
  };
  struct I {
    __m256i a, b;
  };

  static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static inline void stream(float* p, F x) {  // to a whole line
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
  }
  static inline void end_stream() { _mm_sfence(); }
  static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static inline F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static inline F mul_add(F x, F y, F z) { return fma(x, y, z); }
  static inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static inline F floor(F x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
  static inline F nearest(F x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
  }
  static inline F mul_pow2(F p, F n) {
    const I exponent = ishl(round(n), 23);
    return as_float(iadd({_mm256_castps_si256(p.a), _mm256_castps_si256(p.b)}, exponent));
  }
  static inline F scale_pow2(F p, F n, F x) {
    return {scale_half(p.a, n.a, x.a), scale_half(p.b, n.b, x.b)};
  }
  static inline F select_head(int count, F x, F y) {
    const I mask = head(count);
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(mask.a)),
            _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(mask.b))};
  }
  static inline F load_head(const float* p, int count, F y) {
    const I mask = head(count);
    const F x = {_mm256_maskload_ps(p, mask.a), _mm256_maskload_ps(p + 8, mask.b)};
    return select_head(count, x, y);
  }
  static inline void store_head(float* p, int count, F x) {
    const I mask = head(count);
    _mm256_maskstore_ps(p, mask.a, x.a);
    _mm256_maskstore_ps(p + 8, mask.b, x.b);
  }
  static inline uint32_t less_equal(F x, F y) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ));
    return static_cast<uint32_t>(low | high << 8);
  }
  static inline F add_less_equal(F sum, F x, F y, F z) {
    return {_mm256_add_ps(sum.a, _mm256_and_ps(z.a, _mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ))),
            _mm256_add_ps(sum.b, _mm256_and_ps(z.b, _mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ)))};
  }
  static inline F load_half(const void* p) {
    const auto* halves = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  static inline F load_bf16(const void* p) {
    const auto* halves = static_cast<const __m128i*>(p);
    const I low = {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)),
                   _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))};
    return as_float(ishl(low, 16));
  }
  static inline float reduce_add(F x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
  static inline float reduce_max(F x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
  }

  static inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static inline I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static inline I iload(const void* p) {
    const auto* vectors = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
  }
  static inline void istore(void* p, I x) {
    auto* vectors = static_cast<__m256i*>(p);
    _mm256_storeu_si256(vectors, x.a);
    _mm256_storeu_si256(vectors + 1, x.b);
  }
  static inline I ibroadcast(const void* p) { return iset1(*static_cast<const int32_t*>(p)); }
  static inline I iadd(I x, I y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
  }
  static inline I isub(I x, I y) {
    return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
  }
  static inline I iand(I x, I y) {
    return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
  }
  static inline I ior(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static inline I ixor(I x, I y, I z) {
    return {_mm256_xor_si256(_mm256_xor_si256(x.a, y.a), z.a),
            _mm256_xor_si256(_mm256_xor_si256(x.b, y.b), z.b)};
  }
  static inline I ishl(I x, int n) {
    return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
  }
  static inline I ishr(I x, int n) {
    return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
  }
  static inline I isar(I x, int n) {
    return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)};
  }
  static inline I imul_short(I x, I y) {
    return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)};
  }
  static inline I load_table(const int8_t* p) {
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {table, table};
  }
  static inline I lookup16(I codes, I table) {
    return {_mm256_shuffle_epi8(table.a, codes.a), _mm256_shuffle_epi8(table.b, codes.b)};
  }
  static inline void imul_wide(I x, uint32_t y, I& high, I& low) {
    const __m256i factor = _mm256_set1_epi32(static_cast<int32_t>(y));
    mul_wide_half(x.a, factor, high.a, low.a);
    mul_wide_half(x.b, factor, high.b, low.b);
  }
  static inline I load_u8(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }
  static inline I load_i8(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
  }
  static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static inline I round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static inline void store_i8(int8_t* p, I x) {
    const __m256i low_bytes =
        _mm256_set1_epi32(0xFF);  // the low byte of each lane, as AVX-512 stores it
    const __m256i words =
        _mm256_packus_epi32(_mm256_and_si256(x.a, low_bytes), _mm256_and_si256(x.b, low_bytes));
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m256i ordered =
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
  }
  static inline int32_t reduce_iadd(I x) {
    const __m256i eight = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
  }
  static inline I abs_bits(F x) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    return {_mm256_and_si256(_mm256_castps_si256(x.a), mask),
            _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
  }
  static inline I imax(I x, I y) {
    return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
  }
  static inline int32_t reduce_imax(I x) {
    const __m256i eight = _mm256_max_epi32(x.a, x.b);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
  }
  static inline F as_float(I bits) {
    return {_mm256_castsi256_ps(bits.a), _mm256_castsi256_ps(bits.b)};
  }
  static inline I reduce_iadd_each(const I (&x)[6]) { return reduce_each(x, reduce_iadd); }
  static inline I reduce_imax_each(const I (&x)[6]) { return reduce_each(x, reduce_imax); }

  static inline I dot(I acc, I u, I s) {
    return {dot_half(acc.a, u.a, s.a), dot_half(acc.b, u.b, s.b)};
  }
  static inline I dot_small(I acc, I u, I s) {
    return {dot_small_half(acc.a, u.a, s.a), dot_small_half(acc.b, u.b, s.b)};
  }
  static inline I dot_signed(I acc, I x, I y) {
    return {dot_signed_half(acc.a, x.a, y.a), dot_signed_half(acc.b, x.b, y.b)};
  }
  static inline I short_sums(I u, I s) {
    return {_mm256_maddubs_epi16(u.a, s.a), _mm256_maddubs_epi16(u.b, s.b)};
  }
  static inline I short_sums_signed(I x, I y) {
    return {short_sums_half(x.a, y.a), short_sums_half(x.b, y.b)};
  }
  static inline I add_short(I x, I y) {
    return {now(_mm256_add_epi16(x.a, y.a)), now(_mm256_add_epi16(x.b, y.b))};
  }
  static inline I add_shorts(I acc, I x) {
    return {add_shorts_half(acc.a, x.a), add_shorts_half(acc.b, x.b)};
  }
  static inline F dot_bf16(F acc, I x, I y) {
    return {dot_bf16_half(acc.a, x.a, y.a), dot_bf16_half(acc.b, x.b, y.b)};
  }
  static inline void store_bf16(void* p, F x) {
    const __m256i words = _mm256_packus_epi32(to_bf16(x.a), to_bf16(x.b));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xD8));
  }
  static inline I pair_bf16(F x, F y) {
    return {_mm256_or_si256(to_bf16(x.a), _mm256_slli_epi32(to_bf16(y.a), 16)),
            _mm256_or_si256(to_bf16(x.b), _mm256_slli_epi32(to_bf16(y.b), 16))};
  }
  static inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static inline void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }
  static inline void prefetch_l2(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

 private:
  // Forces the addition to happen here. Otherwise GCC computes the products of many steps first,
  // which do not fit in registers, and adds them up later.
  static inline __m256i now(__m256i x) {
    asm("" : "+x"(x));
    return x;
  }
  // All bits set in lanes < count.
  static inline I head(int count) {
    const __m256i limit = _mm256_set1_epi32(count);
    return {_mm256_cmpgt_epi32(limit, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(limit, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
  }
  static inline void mul_wide_half(__m256i x, __m256i factor, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(x, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  }
  template <class Reduce>
  static inline I reduce_each(const I (&x)[6], Reduce reduce) {
    return {_mm256_setr_epi32(reduce(x[0]), reduce(x[1]), reduce(x[2]), reduce(x[3]), reduce(x[4]),
                              reduce(x[5]), 0, 0),
            _mm256_setzero_si256()};
  }
  static inline __m256 scale_half(__m256 p, __m256 n, __m256 x) {
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const __m256 scaled = _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
    const __m256 is_tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_ps(_mm256_andnot_ps(is_tiny, scaled), x, is_nan);
  }
#if defined(TGI_HAS_AVX_VNNI)
  static inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
    return _mm256_dpbusd_avx_epi32(acc, u, s);
  }
  static inline __m256i dot_small_half(__m256i acc, __m256i u, __m256i s) {
    return _mm256_dpbusd_avx_epi32(acc, u, s);
  }
#else
  // For all 8-bit values: even and odd bytes are widened to 16 bits, so nothing saturates.
  static inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xFF)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return now(_mm256_add_epi32(acc, _mm256_add_epi32(even, odd)));
  }
  // The sum of two products below 64 * 128 fits in 16 bits.
  static inline __m256i dot_small_half(__m256i acc, __m256i u, __m256i s) {
    return add_shorts_half(acc, _mm256_maddubs_epi16(u, s));
  }
#endif
  static inline __m256i add_shorts_half(__m256i acc, __m256i pairs) {
    return now(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
  // |x| times y with x's sign: the sum of two products below 128 * 128 fits in 16 bits.
  static inline __m256i short_sums_half(__m256i x, __m256i y) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
  }
  static inline __m256i dot_signed_half(__m256i acc, __m256i x, __m256i y) {
    return add_shorts_half(acc, short_sums_half(x, y));
  }
  static inline __m256 dot_bf16_half(__m256 acc, __m256i x, __m256i y) {
    const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)),
                          _mm256_castsi256_ps(_mm256_and_si256(y, high)), acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                           _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), acc);
  }
  // Rounds to nearest, ties to even, into the low half of each lane; denormals become zero, NaN
  // stays NaN.
  static inline __m256i to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x8000));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F800000));
    const __m256i is_denormal = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i finite = _mm256_blendv_epi8(rounded, sign, is_denormal);
    return _mm256_blendv_epi8(finite, quiet, is_nan);
  }
};

}  // namespace
}  // namespace tgi::cpu::step
