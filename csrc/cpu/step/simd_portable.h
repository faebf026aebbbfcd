// Sixteen lanes in plain C++, for any compiler and processor: the reference for the other simd_*.h.
// Everything here rounds like the AVX-512 functions, except mul_add, which rounds twice, and
// dot_bf16, whose order of rounding differs between processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "block_reader.h"
#include "set_sizes.h"

#define TGI_UNROLL(times)  // sixteen lanes of plain code are already long

namespace tgi::cpu::step {
namespace {

struct Portable : SetSizes {
  static constexpr int kNumRegisters = 4;  // of sixteen lanes
  static constexpr const char* kArithmetic = "fma";
  static constexpr bool kHasSignedDot = true;
  static constexpr bool kHasShortSums = false;
  template <class Lane>
  static inline Lane lane(const void* lanes, int i) {
    Lane x;
    std::memcpy(&x, static_cast<const Lane*>(lanes) + i, sizeof(x));
    return x;
  }
  // The compiler's vector extension, in quarters: vectors of 16 bytes are native on both SSE2 and
  // NEON, and longer ones would be in memory.
  struct F {
    typedef float Quarter __attribute__((vector_size(16)));
    Quarter v[4];
    float operator[](int i) const { return lane<float>(v, i); }
  };
  struct I {
    typedef int32_t Quarter __attribute__((vector_size(16)));
    typedef uint32_t UnsignedQuarter __attribute__((vector_size(16)));
    typedef uint64_t Pairs __attribute__((vector_size(16)));
    Quarter v[4];
    int32_t operator[](int i) const { return lane<int32_t>(v, i); }
  };

  // Applies op to each quarter. Forced inline, because at O2 the compiler would emit calls with
  // operands in memory.
  template <class Out, class Op>
  __attribute__((always_inline)) static inline Out quarters(Op op) {
    return {{op(0), op(1), op(2), op(3)}};
  }
  // Applies op to each lane.
  template <class Out, class Op>
  static inline Out each(Op op) {
    decltype(op(0)) lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = op(i);
    Out out;
    static_assert(sizeof(lanes) == sizeof(out));
    std::memcpy(&out, lanes, 64);
    return out;
  }
  static inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
  }
  // Makes NaNs quiet, like processors do.
  static inline uint16_t quiet_half(uint16_t h) {
    return static_cast<uint16_t>((h & 0x7FFFu) > 0x7C00u ? h | 0x200u : h);
  }
  // Rounds to nearest, ties to even; denormals become zero, as in vcvtneps2bf16.
  static inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    if ((bits & 0x7F800000u) == 0) return static_cast<uint16_t>((bits >> 16) & 0x8000u);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
  }

  static inline F zero() { return set1(0.0f); }
  static inline F set1(float x) {
    const F::Quarter v = {x, x, x, x};
    return {{v, v, v, v}};
  }
  static inline F load(const float* p) {
    F a;
    std::memcpy(&a.v, p, 64);
    return a;
  }
  static inline void store(float* p, const F& a) { std::memcpy(p, &a.v, 64); }
  static inline void stream(float* p, const F& a) { store(p, a); }
  static inline void end_stream() {}
  static inline F add(const F& a, const F& b) {
    return quarters<F>([&](int q) { return a.v[q] + b.v[q]; });
  }
  static inline F sub(const F& a, const F& b) {
    return quarters<F>([&](int q) { return a.v[q] - b.v[q]; });
  }
  static inline F mul(const F& a, const F& b) {
    return quarters<F>([&](int q) { return a.v[q] * b.v[q]; });
  }
  static inline F div(const F& a, const F& b) {
    return quarters<F>([&](int q) { return a.v[q] / b.v[q]; });
  }
  static inline F fma(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return std::fmaf(a[i], b[i], c[i]); });
  }
  static inline F mul_add(const F& a, const F& b, const F& c) {
    return quarters<F>([&](int q) { return a.v[q] * b.v[q] + c.v[q]; });
  }
  static inline F min(const F& a, const F& b) {
    return quarters<F>([&](int q) { return a.v[q] < b.v[q] ? a.v[q] : b.v[q]; });
  }
  static inline F max(const F& a, const F& b) {
    return quarters<F>([&](int q) { return a.v[q] > b.v[q] ? a.v[q] : b.v[q]; });
  }
  static inline F floor(const F& a) {
    return each<F>([&](int i) { return std::floor(a[i]); });
  }
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
  static inline F nearest(const F& a) {
    return quarters<F>([&](int q) { return (a.v[q] + kWhole) - kWhole; });
  }
  static inline F mul_pow2(const F& p, const F& n) {
    return quarters<F>([&](int q) {
      return (F::Quarter)((I::Quarter)p.v[q] + ((I::Quarter)(n.v[q] + kWhole) << 23));
    });
  }
  static inline F scale_pow2(const F& p, const F& n, const F& x) {
    return each<F>([&](int i) {
      if (x[i] < -126.0f) return 0.0f;
      if (x[i] != x[i]) return x[i];
      return p[i] * from_bits(static_cast<uint32_t>(static_cast<int>(n[i]) + 127) << 23);
    });
  }
  static inline F select_head(int count, const F& a, const F& b) {
    return each<F>([&](int i) { return i < count ? a[i] : b[i]; });
  }
  static inline F load_head(const float* p, int count, F b) {
    std::memcpy(&b.v, p, static_cast<size_t>(count) * sizeof(float));
    return b;
  }
  static inline void store_head(float* p, int count, const F& a) {
    std::memcpy(p, &a.v, static_cast<size_t>(count) * sizeof(float));
  }
  static inline uint32_t less_equal(const F& a, const F& b) {
    const I::Quarter places = {1, 2, 4, 8};
    const I::Quarter low = ((a.v[0] <= b.v[0]) & places) | ((a.v[1] <= b.v[1]) & places << 4);
    const I::Quarter high = ((a.v[2] <= b.v[2]) & places) | ((a.v[3] <= b.v[3]) & places << 4);
    const I::Quarter bits = low | high << 8;
    return static_cast<uint32_t>((bits[0] | bits[1]) | (bits[2] | bits[3]));
  }
  static inline F add_less_equal(const F& sum, const F& a, const F& b, const F& x) {
    return quarters<F>(
        [&](int q) { return sum.v[q] + (F::Quarter)((I::Quarter)x.v[q] & (a.v[q] <= b.v[q])); });
  }
  static inline F load_half(const void* p) {
    uint16_t h[16];
    std::memcpy(h, p, 32);
    return each<F>([&](int i) { return half_to_float(quiet_half(h[i])); });
  }
  static inline F load_bf16(const void* p) {
    return as_float(
        each<I>([&](int i) { return static_cast<int32_t>(uint32_t{lane<uint16_t>(p, i)} << 16); }));
  }
  static inline float reduce_add(const F& a) {
    const F::Quarter sum = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
  static inline float reduce_max(const F& a) {
    const auto larger = [](auto x, auto y) { return x > y ? x : y; };
    const F::Quarter best = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
    return larger(larger(best[0], best[2]), larger(best[1], best[3]));
  }

  static inline I izero() { return iset1(0); }
  static inline I iset1(int32_t x) {
    const I::Quarter v = {x, x, x, x};
    return {{v, v, v, v}};
  }
  static inline I iload(const void* p) {
    I a;
    std::memcpy(&a.v, p, 64);
    return a;
  }
  static inline void istore(void* p, const I& a) { std::memcpy(p, &a.v, 64); }
  static inline I ibroadcast(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return iset1(x);
  }
  static inline I iadd(const I& a, const I& b) {
    return quarters<I>([&](int q) { return a.v[q] + b.v[q]; });
  }
  static inline I isub(const I& a, const I& b) {
    return quarters<I>([&](int q) { return a.v[q] - b.v[q]; });
  }
  static inline I iand(const I& a, const I& b) {
    return quarters<I>([&](int q) { return a.v[q] & b.v[q]; });
  }
  static inline I ior(const I& a, const I& b) {
    return quarters<I>([&](int q) { return a.v[q] | b.v[q]; });
  }
  static inline I ixor(const I& a, const I& b, const I& c) {
    return quarters<I>([&](int q) { return a.v[q] ^ b.v[q] ^ c.v[q]; });
  }
  static inline I ishl(const I& a, int n) {
    return quarters<I>([&](int q) { return (I::Quarter)((I::UnsignedQuarter)a.v[q] << n); });
  }
  static inline I ishr(const I& a, int n) {
    return quarters<I>([&](int q) { return (I::Quarter)((I::UnsignedQuarter)a.v[q] >> n); });
  }
  static inline I isar(const I& a, int n) {
    return quarters<I>([&](int q) { return a.v[q] >> n; });
  }
  static inline I imul_short(const I& a, const I& b) {
    return quarters<I>(
        [&](int q) { return a.v[q] * ((I::Quarter)((I::UnsignedQuarter)b.v[q] << 16) >> 16); });
  }
  static inline I load_table(const int8_t* p) {
    int8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = p[i % 16];
    return iload(bytes);
  }
  static inline I lookup16(const I& codes, const I& table) {
    uint8_t indices[64], bytes[64], out[64];
    std::memcpy(indices, &codes.v, 64);
    std::memcpy(bytes, &table.v, 64);
    for (int i = 0; i < 64; ++i) out[i] = bytes[indices[i] & 15];
    return iload(out);
  }
  static inline void imul_wide(const I& a, uint32_t b, I& high, I& low) {
    for (int q = 0; q < 4; ++q) {
      const I::Pairs even = mul_even(a.v[q], b),
                     odd = mul_even((I::Quarter)((I::Pairs)a.v[q] >> 32), b);
      high.v[q] = (I::Quarter)((even >> 32) | (odd & ~kLower));
      low.v[q] = (I::Quarter)((even & kLower) | (odd << 32));
    }
  }
  static inline I load_u8(const void* p) {
    return each<I>([&](int i) { return static_cast<int32_t>(static_cast<const uint8_t*>(p)[i]); });
  }
  static inline I load_i8(const void* p) {
    return each<I>([&](int i) { return static_cast<int32_t>(static_cast<const int8_t*>(p)[i]); });
  }
  static inline F to_float(const I& a) {
    return quarters<F>([&](int q) { return __builtin_convertvector(a.v[q], F::Quarter); });
  }
  // Values that do not fit (NaN, infinity) become INT32_MIN, as in vcvtps2dq.
  static inline I round(const F& a) {
    return each<I>([&](int i) {
      return std::fabs(a[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyintf(a[i]))
                                             : INT32_MIN;
    });
  }
  static inline void store_i8(int8_t* p, const I& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a[i]);
  }
  // Wraps around, as registers do: INT32_MIN stands for values that are not finite.
  static inline int32_t reduce_iadd(const I& a) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += static_cast<uint32_t>(a[i]);
    return static_cast<int32_t>(sum);
  }
  static inline I abs_bits(const F& a) {
    return quarters<I>([&](int q) { return (I::Quarter)a.v[q] & 0x7FFFFFFF; });
  }
  static inline I imax(const I& a, const I& b) {
    return quarters<I>([&](int q) { return a.v[q] > b.v[q] ? a.v[q] : b.v[q]; });
  }
  static inline int32_t reduce_imax(const I& a) {
    int32_t best = a[0];
    for (int i = 1; i < 16; ++i) best = a[i] > best ? a[i] : best;
    return best;
  }
  static inline F as_float(const I& bits) {
    return quarters<F>([&](int q) { return (F::Quarter)bits.v[q]; });
  }
  static inline I reduce_iadd_each(const I (&a)[6]) { return reduce_each(a, reduce_iadd); }
  static inline I reduce_imax_each(const I (&a)[6]) { return reduce_each(a, reduce_imax); }
  static inline I dot(const I& acc, const I& u, const I& s) {
    return quarters<I>([&](int q) {
      const auto codes = (I::UnsignedQuarter)u.v[q], values = (I::UnsignedQuarter)s.v[q];
      I::Quarter sum = acc.v[q];
#pragma GCC unroll 4
      for (int byte = 0; byte < 32; byte += 8) {
        sum += (I::Quarter)((codes >> byte) & 0xFFu) * ((I::Quarter)(values << (24 - byte)) >> 24);
      }
      return sum;
    });
  }
  static inline I dot_small(const I& acc, const I& u, const I& s) { return dot(acc, u, s); }
  static inline I dot_signed(const I& acc, const I& a, const I& b) {
    return quarters<I>([&](int q) {
      const auto codes = (I::UnsignedQuarter)a.v[q], values = (I::UnsignedQuarter)b.v[q];
      I::Quarter sum = acc.v[q];
      for (int byte = 0; byte < 32; byte += 8) {
        const auto code = (I::Quarter)(codes << (24 - byte)) >> 24;
        sum += code * ((I::Quarter)(values << (24 - byte)) >> 24);
      }
      return sum;
    });
  }
  static inline F dot_bf16(const F& acc, const I& a, const I& b) {
    return each<F>([&](int i) {
      const uint32_t x = static_cast<uint32_t>(a[i]), y = static_cast<uint32_t>(b[i]);
      const float sum = std::fmaf(from_bits(x & 0xFFFF0000u), from_bits(y & 0xFFFF0000u), acc[i]);
      return std::fmaf(from_bits(x << 16), from_bits(y << 16), sum);
    });
  }
  static inline void store_bf16(void* p, const F& a) {
    uint16_t h[16];
    for (int i = 0; i < 16; ++i) h[i] = float_to_bf16(a[i]);
    std::memcpy(p, h, 32);
  }
  static inline I pair_bf16(const F& a, const F& b) {
    return each<I>([&](int i) {
      const uint32_t low = float_to_bf16(a[i]), high = float_to_bf16(b[i]);
      return static_cast<int32_t>(low | (high << 16));
    });
  }
  static inline void prefetch(const void*) {}
  static inline void prefetch_write(const void*) {}
  static inline void prefetch_l2(const void*) {}

 private:
  static constexpr float kWhole = 12582912.0f;
  static constexpr I::Pairs kLower = {0xFFFFFFFFu, 0xFFFFFFFFu};

  // Multiplies the lower half of each pair.
  static inline I::Pairs mul_even(const I::Quarter& a, uint32_t b) {
#if defined(__SSE2__)
    // Compilers would emit three multiplications for the plain product, and sampling spends all its
    // time here.
    return (I::Pairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi32(static_cast<int32_t>(b)));
#else
    return ((I::Pairs)a & kLower) * b;
#endif
  }
  template <class Reduce>
  static inline I reduce_each(const I (&a)[6], Reduce reduce) {
    int32_t lanes[16] = {};
    for (int i = 0; i < 6; ++i) lanes[i] = reduce(a[i]);
    return iload(lanes);
  }
};

}  // namespace
}  // namespace tgi::cpu::step
