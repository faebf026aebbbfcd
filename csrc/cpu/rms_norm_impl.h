// RMSNorm of rows; see simd.h for how this file becomes three variants.
#pragma once

#include "simd.h"

namespace tgi::cpu::TGI_ISA {

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.hidden;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = p.x + (p.rows != nullptr ? p.rows[row] : row) * n;  // [hidden]
    float* out = p.out + row * n;                                        // [hidden]
    Vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      for (int k = 0; k < 4; ++k) {
        const Vec v = load(x + i + 16 * k);
        sums[k] = fma(v, v, sums[k]);
      }
    }
    for (; i < n; i += 16) {
      const Vec v = load_first(x + i, n - i);
      sums[0] = fma(v, v, sums[0]);
    }
    const float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const Vec inverse = splat(1.0f / std::sqrt(sum / float(n) + p.eps));
    for (i = 0; i + 16 <= n; i += 16) store(out + i, load(x + i) * inverse * load(p.weight + i));
    if (i < n) {
      store_first(out + i, load_first(x + i, n - i) * inverse * load_first(p.weight + i, n - i),
                  n - i);
    }
  }
}

}  // namespace tgi::cpu::TGI_ISA
