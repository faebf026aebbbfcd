// Sixteen lanes in one AVX-512 register: the vocabulary in which the kernels of this folder are
// written. The other simd_*.h offer the same functions with the same rounding, except where a
// comment says otherwise, so a kernel is one template over them. Included only after a `#pragma GCC
// target` that enables AVX-512 F/BW/DQ/VL and VNNI, and BF16 if TGI_HAS_BF16 is defined.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "set_sizes.h"

#define TGI_PRAGMA(text) _Pragma(#text)
#define TGI_UNROLL(times) TGI_PRAGMA(GCC unroll times)

namespace tgi::cpu::step {
namespace {

struct Avx512 : SetSizes {
  static constexpr int kNumRegisters = 32;  // of sixteen lanes
  static constexpr bool kDecodesCodes = true;
#if defined(TGI_HAS_BF16)
  static constexpr const char* kArithmetic = "vdpbf16ps";
  static constexpr bool kHasBF16Dot = true;
  static constexpr bool kStoresBF16Pairs = true;
#else
  static constexpr const char* kArithmetic = "fma";
#endif
  // Whether dot_signed, for signed bytes above -128, exists and is faster than `dot`.
  static constexpr bool kHasSignedDot = false;
  // Whether products of small codes can be added up in 16 bits, and that is faster than dot_small.
  // short_sums computes sums of two neighbouring products; add_short adds such sums, and add_shorts
  // adds them to 32-bit sums.
  static constexpr bool kHasShortSums = false;
  using F = __m512;   // 16 float
  using I = __m512i;  // 16 int32, or 64 bytes

  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F set1(float x) { return _mm512_set1_ps(x); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline void stream(float* p, F a) { _mm512_stream_ps(p, a); }  // to a whole line
  static inline void end_stream() { _mm_sfence(); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // a * b + c, rounded once or twice, whichever is faster; the bits differ between instruction
  // sets.
  static inline F mul_add(F a, F b, F c) { return fma(a, b, c); }
  // Returns the second operand if either is NaN, like the instructions.
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F floor(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  // The nearest whole number, ties to even, for |a| < 2^22.
  static inline F nearest(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // p * 2^n for integral n, if neither p nor the result is denormal.
  static inline F mul_pow2(F p, F n) { return _mm512_scalef_ps(p, n); }
  // p * 2^n, where n is floor(x), and 0 if x < -126, because members flush denormals to zero.
  static inline F scale_pow2(F p, F n, F) { return _mm512_scalef_ps(p, n); }
  // a in lanes < count, else b.
  static inline F select_head(int count, F a, F b) {
    return _mm512_mask_blend_ps(head(count), b, a);
  }
  // p[lane] in lanes < count <= 16, else b; reads nothing past them.
  static inline F load_head(const float* p, int count, F b) {
    return _mm512_mask_loadu_ps(b, head(count), p);
  }
  // Writes lanes < count <= 16.
  static inline void store_head(float* p, int count, F a) {
    _mm512_mask_storeu_ps(p, head(count), a);
  }
  // Bit i: a[i] <= b[i]; false if either is NaN.
  static inline uint32_t less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  // sum + x in lanes with a <= b, else sum.
  static inline F add_less_equal(F sum, F a, F b, F x) {
    return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), sum, x);
  }
  static inline F load_half(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static inline F load_bf16(const void* p) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
  }
  static inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  static inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

  static inline I izero() { return _mm512_setzero_si512(); }
  static inline I iset1(int32_t x) { return _mm512_set1_epi32(x); }
  static inline I iload(const void* p) { return _mm512_loadu_si512(p); }
  static inline void istore(void* p, I a) { _mm512_storeu_si512(p, a); }
  static inline I ibroadcast(const void* p) {
    return _mm512_set1_epi32(*static_cast<const int32_t*>(p));
  }
  static inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static inline I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static inline I ior(I a, I b) { return _mm512_or_si512(a, b); }
  static inline I ixor(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static inline I ishl(I a, int n) { return _mm512_slli_epi32(a, n); }
  static inline I ishr(I a, int n) { return _mm512_srli_epi32(a, n); }
  static inline I isar(I a, int n) { return _mm512_srai_epi32(a, n); }
  // a * b, both signed 16-bit numbers; the upper half of b's lanes is zero.
  static inline I imul_short(I a, I b) { return _mm512_madd_epi16(a, b); }
  // Loads a table of sixteen bytes; lookup16 replaces each byte of `codes`, below 16, by the
  // table's byte at that index.
  static inline I load_table(const int8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline I lookup16(I codes, I table) { return _mm512_shuffle_epi8(table, codes); }
  // The upper and lower 32 bits of the unsigned product a[i] * b.
  static inline void imul_wide(I a, uint32_t b, I& high, I& low) {
    const I factor = iset1(static_cast<int32_t>(b));
    const I even = _mm512_mul_epu32(a, factor);
    const I odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
    low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  }
  static inline I load_u8(const void* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static inline I load_i8(const void* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static inline I round(F a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
  static inline void store_i8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static inline int32_t reduce_iadd(I a) { return _mm512_reduce_add_epi32(a); }
  // The bits of |a|. As integers they are ordered like the values, with infinity and then NaN on
  // top.
  static inline I abs_bits(F a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF));
  }
  static inline I imax(I a, I b) { return _mm512_max_epi32(a, b); }
  static inline int32_t reduce_imax(I a) { return _mm512_reduce_max_epi32(a); }
  static inline F as_float(I bits) { return _mm512_castsi512_ps(bits); }
  // Lane i: the sum, or the maximum, of the lanes of a[i], for i below six. The other lanes are
  // undefined.
  static inline I reduce_iadd_each(const I (&a)[6]) { return reduce_each(a, iadd); }
  static inline I reduce_imax_each(const I (&a)[6]) { return reduce_each(a, imax); }

  // Per lane: acc + the sum over four bytes of unsigned u times signed s. Exact.
  static inline I dot(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
  // The same if every byte of u is below 64.
  static inline I dot_small(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
#if defined(TGI_HAS_BF16)
  // Per lane: acc + the sum over two bf16 of a times b.
  static inline F dot_bf16(F acc, I a, I b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static inline void store_bf16(void* p, F a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
  // The same for a, then b.
  static inline void store_bf16(void* p, F a, F b) {
    istore(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
  // Lane i: bf16(a[i]) in the low half, bf16(b[i]) in the high half.
  static inline I pair_bf16(F a, F b) {
    alignas(64) static constexpr uint16_t kAlternate[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    return _mm512_permutexvar_epi16(_mm512_load_si512(kAlternate), both);
  }
#else
  static inline F dot_bf16(F acc, I a, I b) {
    const I high = iset1(static_cast<int32_t>(0xFFFF0000u));
    acc = fma(_mm512_castsi512_ps(iand(a, high)), _mm512_castsi512_ps(iand(b, high)), acc);
    return fma(_mm512_castsi512_ps(ishl(a, 16)), _mm512_castsi512_ps(ishl(b, 16)), acc);
  }
  static inline void store_bf16(void* p, F a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(to_bf16(a)));
  }
  static inline I pair_bf16(F a, F b) { return ior(to_bf16(a), ishl(to_bf16(b), 16)); }

  // Rounds to nearest, ties to even, into the low half of each lane; denormals become zero, NaN
  // stays NaN.
  static inline I to_bf16(F a) {
    const I bits = _mm512_castps_si512(a), top = ishr(bits, 16);
    const I rounded = ishr(iadd(bits, iadd(iand(top, iset1(1)), iset1(0x7FFF))), 16);
    const __mmask16 is_denormal = _mm512_testn_epi32_mask(bits, iset1(0x7F800000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const I finite = _mm512_mask_and_epi32(rounded, is_denormal, top, iset1(0x8000));
    return _mm512_mask_or_epi32(finite, is_nan, top, iset1(0x40));
  }
#endif
  static inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  // Prefetches for writing, which removes the line from other cores' caches.
  static inline void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }
  // Prefetches into L2 only.
  static inline void prefetch_l2(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

 private:
  static inline __mmask16 head(int count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (count <= 0 ? 0 : (1u << count) - 1));
  }
  // Each fold reduces two vectors with the instructions of one.
  template <class Op>
  static inline I reduce_each(const I (&a)[6], Op op) {
    const I low = fold_halves(a[0], a[1], op), middle = fold_halves(a[2], a[3], op);
    const I high = fold_halves(a[4], a[5], op);
    const I four = fold_quarters(low, middle, op);  // quarter i belongs to a[i]
    const I two = fold_quarters(high, high, op);    // quarters belong to a[4], a[5], a[4], a[5]
    const I pairs = op(_mm512_unpacklo_epi64(four, two), _mm512_unpackhi_epi64(four, two));
    const I all = op(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_CDAB));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_epi32(order, all);
  }
  template <class Op>
  static inline I fold_halves(I a, I b, Op op) {
    return op(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
  }
  template <class Op>
  static inline I fold_quarters(I a, I b, Op op) {
    return op(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
  }
};

}  // namespace
}  // namespace tgi::cpu::step
