// Sixteen lanes in four NEON registers; see simd_avx512.h. Included only after a `#pragma GCC
// target` that enables the dot product instructions, and i8mm and BF16 if TGI_NEON_I8MM is defined.
// (GCC processes all directives before any pragma, so its own feature macros do not reflect the
// pragma.)
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "set_sizes.h"

#define TGI_PRAGMA(text) _Pragma(#text)
#define TGI_UNROLL(times) TGI_PRAGMA(GCC unroll times)

namespace tgi::cpu::step {
namespace {

struct Neon : SetSizes {
  static constexpr int kNumRegisters = 8;  // of sixteen lanes
#if defined(TGI_NEON_I8MM)
  static constexpr const char* kArithmetic = "bfdot";
  static constexpr bool kHasBF16Dot = true;
#else
  static constexpr const char* kArithmetic = "fma";
#endif
  static constexpr bool kHasSignedDot = true;
  static constexpr bool kHasShortSums = false;
  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };

  // Applies op to each quarter.
  template <class Out, class Op>
  static inline Out each(Op op) {
    return {{op(0), op(1), op(2), op(3)}};
  }

  static inline F zero() { return set1(0.0f); }
  static inline F set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {{v, v, v, v}};
  }
  static inline F load(const float* p) {
    return each<F>([&](int i) { return vld1q_f32(p + 4 * i); });
  }
  static inline void store(float* p, const F& a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
  }
  static inline void stream(float* p, const F& a) { store(p, a); }
  static inline void end_stream() {}
  static inline F add(const F& a, const F& b) {
    return each<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static inline F sub(const F& a, const F& b) {
    return each<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static inline F mul(const F& a, const F& b) {
    return each<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static inline F div(const F& a, const F& b) {
    return each<F>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static inline F fma(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static inline F mul_add(const F& a, const F& b, const F& c) { return fma(a, b, c); }
  static inline F min(const F& a, const F& b) {
    return each<F>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static inline F max(const F& a, const F& b) {
    return each<F>([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static inline F floor(const F& a) {
    return each<F>([&](int i) { return vrndmq_f32(a.v[i]); });
  }
  static inline F nearest(const F& a) {
    return each<F>([&](int i) { return vrndnq_f32(a.v[i]); });
  }
  static inline F mul_pow2(const F& p, const F& n) {
    return each<F>([&](int i) {
      const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n.v[i]), 23);
      return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.v[i]), exponent));
    });
  }
  static inline F scale_pow2(const F& p, const F& n, const F& x) {
    return each<F>([&](int i) {
      const int32x4_t exponent =
          vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23);
      const float32x4_t scaled = vmulq_f32(p.v[i], vreinterpretq_f32_s32(exponent));
      const uint32x4_t is_tiny = vcltq_f32(x.v[i], vdupq_n_f32(-126.0f));
      const uint32x4_t is_number = vceqq_f32(x.v[i], x.v[i]);
      const float32x4_t kept = vbslq_f32(is_tiny, vdupq_n_f32(0.0f), scaled);
      return vbslq_f32(is_number, kept, x.v[i]);
    });
  }
  static inline F select_head(int count, const F& a, const F& b) {
    const int32_t first[4] = {0, 1, 2, 3};
    const int32x4_t lanes = vld1q_s32(first);
    return each<F>([&](int i) {
      const int32x4_t index = vaddq_s32(lanes, vdupq_n_s32(4 * i));
      return vbslq_f32(vcltq_s32(index, vdupq_n_s32(count)), a.v[i], b.v[i]);
    });
  }
  static inline F load_head(const float* p, int count, const F& b) {
    float lanes[16];
    store(lanes, b);
    std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
    return load(lanes);
  }
  static inline void store_head(float* p, int count, const F& a) {
    float lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
  }
  static inline uint32_t less_equal(const F& a, const F& b) {
    const uint32_t places[4] = {1, 2, 4, 8};
    const uint32x4_t bits = vld1q_u32(places);
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) {
      found |= vaddvq_u32(vandq_u32(vcleq_f32(a.v[i], b.v[i]), bits)) << 4 * i;
    }
    return found;
  }
  static inline F add_less_equal(const F& sum, const F& a, const F& b, const F& x) {
    return each<F>([&](int i) {
      const uint32x4_t is_added = vcleq_f32(a.v[i], b.v[i]);
      const uint32x4_t added = vandq_u32(vreinterpretq_u32_f32(x.v[i]), is_added);
      return vaddq_f32(sum.v[i], vreinterpretq_f32_u32(added));
    });
  }
  static inline F load_half(const void* p) {
    const auto* halves = static_cast<const __fp16*>(p);
    return each<F>([&](int i) { return vcvt_f32_f16(vld1_f16(halves + 4 * i)); });
  }
  static inline F load_bf16(const void* p) {
    const auto* halves = static_cast<const uint16_t*>(p);
    return each<F>(
        [&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(halves + 4 * i), 16)); });
  }
  static inline float reduce_add(const F& a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static inline float reduce_max(const F& a) {
    float lanes[16];
    store(lanes, a);
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i)
        lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    }
    return lanes[0];
  }

  static inline I izero() { return iset1(0); }
  static inline I iset1(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {{v, v, v, v}};
  }
  static inline I iload(const void* p) {
    const auto* words = static_cast<const int32_t*>(p);
    return each<I>([&](int i) { return vld1q_s32(words + 4 * i); });
  }
  static inline void istore(void* p, const I& a) {
    for (int i = 0; i < 4; ++i) vst1q_s32(static_cast<int32_t*>(p) + 4 * i, a.v[i]);
  }
  static inline I ibroadcast(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return iset1(x);
  }
  static inline I iadd(const I& a, const I& b) {
    return each<I>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
  }
  static inline I isub(const I& a, const I& b) {
    return each<I>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
  }
  static inline I iand(const I& a, const I& b) {
    return each<I>([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
  }
  static inline I ior(const I& a, const I& b) {
    return each<I>([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
  }
  static inline I ixor(const I& a, const I& b, const I& c) {
    return each<I>([&](int i) { return veorq_s32(veorq_s32(a.v[i], b.v[i]), c.v[i]); });
  }
  static inline I ishl(const I& a, int n) {
    return each<I>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(n)); });
  }
  static inline I ishr(const I& a, int n) {
    return each<I>([&](int i) {
      const uint32x4_t bits = vreinterpretq_u32_s32(a.v[i]);
      return vreinterpretq_s32_u32(vshlq_u32(bits, vdupq_n_s32(-n)));
    });
  }
  static inline I isar(const I& a, int n) {
    return each<I>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(-n)); });
  }
  static inline I imul_short(const I& a, const I& b) {
    return each<I>(
        [&](int i) { return vmulq_s32(a.v[i], vshrq_n_s32(vshlq_n_s32(b.v[i], 16), 16)); });
  }
  static inline I load_table(const int8_t* p) {
    const int32x4_t table = vreinterpretq_s32_s8(vld1q_s8(p));
    return {{table, table, table, table}};
  }
  static inline I lookup16(const I& codes, const I& table) {
    return each<I>([&](int i) {
      const uint8x16_t indices = vreinterpretq_u8_s32(codes.v[i]);
      return vreinterpretq_s32_s8(vqtbl1q_s8(vreinterpretq_s8_s32(table.v[i]), indices));
    });
  }
  static inline void imul_wide(const I& a, uint32_t b, I& high, I& low) {
    const uint32x4_t factor = vdupq_n_u32(b);
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t x = vreinterpretq_u32_s32(a.v[i]);
      const uint32x4_t first =
          vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(factor)));
      const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_u32(x, factor));
      high.v[i] = vreinterpretq_s32_u32(vuzp2q_u32(first, last));
      low.v[i] = vreinterpretq_s32_u32(vuzp1q_u32(first, last));
    }
  }
  static inline I load_u8(const void* p) {
    const uint8x16_t bytes = vld1q_u8(static_cast<const uint8_t*>(p));
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
  }
  static inline I load_i8(const void* p) {
    const int8x16_t bytes = vld1q_s8(static_cast<const int8_t*>(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
             vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
  }
  static inline F to_float(const I& a) {
    return each<F>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
  static inline I round(const F& a) {
    return each<I>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
  }
  static inline void store_i8(int8_t* p, const I& a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }
  static inline int32_t reduce_iadd(const I& a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
  }
  static inline I abs_bits(const F& a) {
    return each<I>([&](int i) { return vreinterpretq_s32_f32(vabsq_f32(a.v[i])); });
  }
  static inline I imax(const I& a, const I& b) {
    return each<I>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
  }
  static inline int32_t reduce_imax(const I& a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
  }
  static inline F as_float(const I& bits) {
    return each<F>([&](int i) { return vreinterpretq_f32_s32(bits.v[i]); });
  }
  static inline I reduce_iadd_each(const I (&a)[6]) { return reduce_each(a, reduce_iadd); }
  static inline I reduce_imax_each(const I (&a)[6]) { return reduce_each(a, reduce_imax); }

  static inline I dot(const I& acc, const I& u, const I& s) {
    return each<I>([&](int i) {
      const int8x16_t values = vreinterpretq_s8_s32(s.v[i]);
#if defined(TGI_NEON_I8MM)
      return vusdotq_s32(acc.v[i], vreinterpretq_u8_s32(u.v[i]), values);
#else
      // u = (u - 128) + 64 + 64, each of which is a signed byte.
      const int8x16_t centred = veorq_s8(vreinterpretq_s8_s32(u.v[i]), vdupq_n_s8(-128));
      const int8x16_t half = vdupq_n_s8(64);
      return vdotq_s32(vdotq_s32(vdotq_s32(acc.v[i], centred, values), half, values), half, values);
#endif
    });
  }
  static inline I dot_small(const I& acc, const I& u, const I& s) {
    return each<I>([&](int i) {
      return vdotq_s32(acc.v[i], vreinterpretq_s8_s32(u.v[i]), vreinterpretq_s8_s32(s.v[i]));
    });
  }
  static inline I dot_signed(const I& acc, const I& a, const I& b) {
    return each<I>([&](int i) {
      return vdotq_s32(acc.v[i], vreinterpretq_s8_s32(a.v[i]), vreinterpretq_s8_s32(b.v[i]));
    });
  }
  static inline F dot_bf16(const F& acc, const I& a, const I& b) {
    return each<F>([&](int i) {
#if defined(TGI_NEON_I8MM)
      return vbfdotq_f32(acc.v[i], vreinterpretq_bf16_s32(a.v[i]), vreinterpretq_bf16_s32(b.v[i]));
#else
      const int32x4_t high = vdupq_n_s32(static_cast<int32_t>(0xFFFF0000u));
      const float32x4_t sum = vfmaq_f32(acc.v[i], vreinterpretq_f32_s32(vandq_s32(a.v[i], high)),
                                        vreinterpretq_f32_s32(vandq_s32(b.v[i], high)));
      return vfmaq_f32(sum, vreinterpretq_f32_s32(vshlq_n_s32(a.v[i], 16)),
                       vreinterpretq_f32_s32(vshlq_n_s32(b.v[i], 16)));
#endif
    });
  }
  static inline void store_bf16(void* p, const F& a) {
    const I words = to_bf16(a);
    for (int i = 0; i < 4; ++i) {
      const uint16x4_t narrow = vmovn_u32(vreinterpretq_u32_s32(words.v[i]));
      std::memcpy(static_cast<uint8_t*>(p) + 8 * i, &narrow, 8);
    }
  }
  static inline I pair_bf16(const F& a, const F& b) {
    return ior(to_bf16(a), ishl(to_bf16(b), 16));
  }
  static inline void prefetch(const void* p) { __builtin_prefetch(p); }
  static inline void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }
  static inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

 private:
  template <class Reduce>
  static inline I reduce_each(const I (&a)[6], Reduce reduce) {
    int32_t lanes[16] = {};
    for (int i = 0; i < 6; ++i) lanes[i] = reduce(a[i]);
    return iload(lanes);
  }
  // Rounds to nearest, ties to even, into the low half of each lane; denormals become zero, NaN
  // stays NaN.
  static inline I to_bf16(const F& a) {
    return each<I>([&](int i) {
      const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
      const uint32x4_t top = vshrq_n_u32(bits, 16);
      const uint32x4_t bias = vaddq_u32(vandq_u32(top, vdupq_n_u32(1)), vdupq_n_u32(0x7FFF));
      const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
      const uint32x4_t exponent = vandq_u32(bits, vdupq_n_u32(0x7F800000u));
      const uint32x4_t is_denormal = vceqq_u32(exponent, vdupq_n_u32(0));
      const uint32x4_t is_number = vceqq_f32(a.v[i], a.v[i]);
      const uint32x4_t signed_zero = vandq_u32(top, vdupq_n_u32(0x8000));
      const uint32x4_t quiet = vorrq_u32(top, vdupq_n_u32(0x40));
      const uint32x4_t finite = vbslq_u32(is_denormal, signed_zero, rounded);
      return vreinterpretq_s32_u32(vbslq_u32(is_number, finite, quiet));
    });
  }
};

}  // namespace
}  // namespace tgi::cpu::step
