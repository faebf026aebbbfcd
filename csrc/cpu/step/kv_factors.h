// How attention multiplies cached keys and values that are floats. Included only by the
// step_<isa>.cpp files.
#pragma once

#include <cstdint>
#include <cstring>

#include "packed.h"

namespace tgi::cpu::step {
namespace {

// How keys and values are multiplied by their factors, which are queries and softmax weights. A
// vector of sixteen lanes holds kNumbers numbers per lane: dims of a key, or tokens of values. It
// is multiplied in kParts parts, each by one broadcast factor, which is at factor_at(part).
template <class S, Precision precision, bool has_dot = S::kHasBF16Dot>
struct KvTraits;

template <class S>
struct KvTraits<S, Precision::kBF16, true> {
  using Vector = typename S::I;  // two bf16 per lane
  static constexpr int kNumbers = 2, kParts = 1;
  static constexpr int64_t kFactorBytes = 2;
  static constexpr int64_t factor_at(int) { return 0; }
  static inline Vector load(const uint8_t* p, int) { return S::iload(p); }
  static inline Vector broadcast(const uint8_t* p) { return S::ibroadcast(p); }
  static inline typename S::F multiply(typename S::F sum, Vector a, Vector b) {
    return S::dot_bf16(sum, a, b);
  }
};

template <class S>
struct KvTraits<S, Precision::kFloat32, true> {
  using Vector = typename S::F;
  static constexpr int kNumbers = 1, kParts = 1;
  static constexpr int64_t kFactorBytes = 4;
  static constexpr int64_t factor_at(int) { return 0; }
  static inline Vector load(const uint8_t* p, int) {
    return S::load(reinterpret_cast<const float*>(p));
  }
  static inline Vector broadcast(const uint8_t* p) {
    return S::set1(*reinterpret_cast<const float*>(p));
  }
  static inline typename S::F multiply(typename S::F sum, Vector a, Vector b) {
    return S::fma(a, b, sum);
  }
};

template <class S>
struct KvTraits<S, Precision::kFloat32, false> : KvTraits<S, Precision::kFloat32, true> {};

// Without an instruction for bf16, factors are float32: only the cached numbers are bf16. The
// second number of each lane, its upper half, is multiplied first.
template <class S>
struct KvTraits<S, Precision::kBF16, false> : KvTraits<S, Precision::kFloat32, true> {
  static constexpr int kNumbers = 2, kParts = 2;
  static constexpr int64_t factor_at(int part) { return part == 0 ? 4 : 0; }
  static inline typename S::F load(const uint8_t* p, int part) {
    const auto pairs = S::iload(p);
    return S::as_float(part == 0 ? S::iand(pairs, S::iset1(static_cast<int32_t>(0xFFFF0000u)))
                                 : S::ishl(pairs, 16));
  }
};

// Whether queries, which are stored as bf16, become float32 before they are multiplied.
template <class S, Precision precision>
constexpr bool kWidensQueries = precision == Precision::kBF16 && !S::kHasBF16Dot;

// Widens a bf16 query to float32.
template <class S>
inline void widen_query(const uint8_t* query, int64_t head_dim, float* out) {
  int64_t d = 0;
  for (; d + 16 <= head_dim; d += 16) S::store(out + d, S::load_bf16(query + 2 * d));
  for (; d < head_dim; ++d) {
    uint16_t half;
    std::memcpy(&half, query + 2 * d, sizeof(half));
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(out + d, &bits, sizeof(bits));
  }
}

}  // namespace
}  // namespace tgi::cpu::step
