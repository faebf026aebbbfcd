// Sixteen lanes in plain C++: the reference of the other simd_*.h, for any compiler and processor.
// Everything here rounds as the AVX-512 functions do, except dot_bf16, whose order of rounding
// processors do not share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define TGI_UNROLL(times)  // sixteen lanes of plain code are long enough

namespace tgi::cpu::step {
namespace {

struct Portable {
  static constexpr int kNumRegisters = 4;  // of sixteen lanes
  static constexpr bool kHasSignedDot = true;
  // Vectors of the compiler's own: arithmetic on them becomes whatever the target has.
  struct F {
    typedef float Lanes __attribute__((vector_size(64)));
    Lanes v;
  };
  struct I {
    typedef int32_t Lanes __attribute__((vector_size(64)));
    typedef uint32_t UnsignedLanes __attribute__((vector_size(64)));
    Lanes v;
  };

  template <class Out, class Op>
  static inline Out each(Op op) {
    Out out;
    for (int i = 0; i < 16; ++i) out.v[i] = op(i);
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
  static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3FFu;
    if (exponent == 0) {
      const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
      return sign ? -magnitude : magnitude;
    }
    if (exponent == 31)
      return from_bits(sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
    return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  }
  // To nearest, ties to even; denormals become zero, as in vcvtneps2bf16.
  static inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    if ((bits & 0x7F800000u) == 0) return static_cast<uint16_t>((bits >> 16) & 0x8000u);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
  }

  static inline F zero() { return set1(0.0f); }
  static inline F set1(float x) { return {F::Lanes{} + x}; }
  static inline F load(const float* p) {
    F a;
    std::memcpy(&a.v, p, 64);
    return a;
  }
  static inline void store(float* p, const F& a) { std::memcpy(p, &a.v, 64); }
  static inline F add(const F& a, const F& b) { return {a.v + b.v}; }
  static inline F sub(const F& a, const F& b) { return {a.v - b.v}; }
  static inline F mul(const F& a, const F& b) { return {a.v * b.v}; }
  static inline F div(const F& a, const F& b) { return {a.v / b.v}; }
  static inline F fma(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return std::fmaf(a.v[i], b.v[i], c.v[i]); });
  }
  static inline F min(const F& a, const F& b) { return {a.v < b.v ? a.v : b.v}; }
  static inline F max(const F& a, const F& b) { return {a.v > b.v ? a.v : b.v}; }
  static inline F floor(const F& a) {
    return each<F>([&](int i) { return std::floor(a.v[i]); });
  }
  static inline F scale_pow2(const F& p, const F& n, const F& x) {
    return each<F>([&](int i) {
      if (x.v[i] < -126.0f) return 0.0f;
      if (x.v[i] != x.v[i]) return x.v[i];
      return p.v[i] * from_bits(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23);
    });
  }
  static inline F select_head(int count, const F& a, const F& b) {
    return each<F>([&](int i) { return i < count ? a.v[i] : b.v[i]; });
  }
  static inline F load_half(const void* p) {
    uint16_t h[16];
    std::memcpy(h, p, 32);
    return each<F>([&](int i) { return half_to_float(h[i]); });
  }
  static inline float reduce_add(F a) {
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
    }
    return a.v[0];
  }
  static inline float reduce_max(F a) {
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
    }
    return a.v[0];
  }

  static inline I izero() { return iset1(0); }
  static inline I iset1(int32_t x) { return {I::Lanes{} + x}; }
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
  static inline I iadd(const I& a, const I& b) { return {a.v + b.v}; }
  static inline I isub(const I& a, const I& b) { return {a.v - b.v}; }
  static inline I iand(const I& a, const I& b) { return {a.v & b.v}; }
  static inline I ior(const I& a, const I& b) { return {a.v | b.v}; }
  static inline I ishl(const I& a, int n) { return {(I::Lanes)((I::UnsignedLanes)a.v << n)}; }
  static inline I ishr(const I& a, int n) { return {(I::Lanes)((I::UnsignedLanes)a.v >> n)}; }
  static inline I isar(const I& a, int n) { return {a.v >> n}; }
  static inline I imul_short(const I& a, const I& b) {
    return {a.v * ((I::Lanes)((I::UnsignedLanes)b.v << 16) >> 16)};
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
  static inline I load_u8(const void* p) {
    return each<I>([&](int i) { return static_cast<int32_t>(static_cast<const uint8_t*>(p)[i]); });
  }
  static inline I load_i8(const void* p) {
    return each<I>([&](int i) { return static_cast<int32_t>(static_cast<const int8_t*>(p)[i]); });
  }
  static inline F to_float(const I& a) { return {__builtin_convertvector(a.v, F::Lanes)}; }
  // What does not fit (NaN, infinity) becomes INT32_MIN, as vcvtps2dq has it.
  static inline I round(const F& a) {
    return each<I>([&](int i) {
      return std::fabs(a.v[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyintf(a.v[i]))
                                               : INT32_MIN;
    });
  }
  static inline void store_i8(int8_t* p, const I& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
  }
  static inline int32_t reduce_iadd(const I& a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += a.v[i];
    return sum;
  }
  static inline I abs_bits(const F& a) { return {(I::Lanes)a.v & 0x7FFFFFFF}; }
  static inline I imax(const I& a, const I& b) { return {a.v > b.v ? a.v : b.v}; }
  static inline int32_t reduce_imax(const I& a) {
    int32_t best = a.v[0];
    for (int i = 1; i < 16; ++i) best = a.v[i] > best ? a.v[i] : best;
    return best;
  }
  static inline F as_float(const I& bits) { return {(F::Lanes)bits.v}; }
  static inline I reduce_iadd_each(const I (&a)[6]) { return reduce_each(a, reduce_iadd); }
  static inline I reduce_imax_each(const I (&a)[6]) { return reduce_each(a, reduce_imax); }
  static inline I dot(const I& acc, const I& u, const I& s) {
    I::Lanes sum = acc.v;
    for (int byte = 0; byte < 32; byte += 8) {
      const auto code = (I::Lanes)(((I::UnsignedLanes)u.v >> byte) & 0xFFu);
      sum += code * ((I::Lanes)((I::UnsignedLanes)s.v << (24 - byte)) >> 24);
    }
    return {sum};
  }
  static inline I dot_small(const I& acc, const I& u, const I& s) { return dot(acc, u, s); }
  static inline I dot_signed(const I& acc, const I& a, const I& b) {
    I::Lanes sum = acc.v;
    for (int byte = 0; byte < 32; byte += 8) {
      const auto code = (I::Lanes)((I::UnsignedLanes)a.v << (24 - byte)) >> 24;
      sum += code * ((I::Lanes)((I::UnsignedLanes)b.v << (24 - byte)) >> 24);
    }
    return {sum};
  }
  static inline F dot_bf16(const F& acc, const I& a, const I& b) {
    return each<F>([&](int i) {
      const uint32_t x = static_cast<uint32_t>(a.v[i]), y = static_cast<uint32_t>(b.v[i]);
      const float sum = std::fmaf(from_bits(x & 0xFFFF0000u), from_bits(y & 0xFFFF0000u), acc.v[i]);
      return std::fmaf(from_bits(x << 16), from_bits(y << 16), sum);
    });
  }
  static inline void store_bf16(void* p, const F& a) {
    uint16_t h[16];
    for (int i = 0; i < 16; ++i) h[i] = float_to_bf16(a.v[i]);
    std::memcpy(p, h, 32);
  }
  static inline I pair_bf16(const F& a, const F& b) {
    return each<I>([&](int i) {
      const uint32_t low = float_to_bf16(a.v[i]), high = float_to_bf16(b.v[i]);
      return static_cast<int32_t>(low | (high << 16));
    });
  }
  static inline void prefetch(const void*) {}
  static inline void prefetch_write(const void*) {}
  static inline void prefetch_l2(const void*) {}

 private:
  template <class Reduce>
  static inline I reduce_each(const I (&a)[6], Reduce reduce) {
    I all = izero();
    for (int i = 0; i < 6; ++i) all.v[i] = reduce(a[i]);
    return all;
  }
};

}  // namespace
}  // namespace tgi::cpu::step
