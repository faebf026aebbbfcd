// Activation of the gate times up; see simd.h for how this file becomes three variants.
#pragma once

#include "simd.h"

namespace tgi::cpu::TGI_ISA {

namespace {

inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Vec gelu_tanh(Vec x) {
  const Vec inner = fma(splat(0.044715f) * x * x, x, x);
  return x / (splat(1.0f) + exp(splat(-1.5957691216057308f) * inner));
}

template <typename Function>
inline void multiply_rows(const ActMulParams& p, int64_t begin, int64_t end,
                          const Function& activate) {
  const int64_t n = p.intermediate;
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = p.gate_up + row * 2 * n;  // [intermediate]
    const float* up = gate + n;                   // [intermediate]
    float* out = p.out + row * n;                 // [intermediate]
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, activate(load(gate + i)) * load(up + i));
    if (i < n) {
      store_first(out + i, activate(load_first(gate + i, n - i)) * load_first(up + i, n - i),
                  n - i);
    }
  }
}

}  // namespace

void act_mul(const ActMulParams& p, int64_t begin, int64_t end) {
  if (p.activation == Activation::kSilu) {
    multiply_rows(p, begin, end, [](Vec x) { return silu(x); });
  } else {
    multiply_rows(p, begin, end, [](Vec x) { return gelu_tanh(x); });
  }
}

}  // namespace tgi::cpu::TGI_ISA
