// The passes over a row of logits that sampling is made of; see simd.h for the three variants.
#pragma once

#include <cfloat>

#include "philox.h"
#include "sample.h"
#include "simd.h"

namespace tgi::cpu::TGI_ISA {

namespace {

// Sums of this many vectors are made in float32, their sum in double: relative error below 1e-6.
constexpr int64_t kSumBlock = 16 * 64;

inline Vec load_or(const float* p, int64_t left, float fill) {
  return left >= 16 ? load(p) : keep_first(load_first(p, left), left, fill);
}

}  // namespace

RowStats row_stats(const float* x, int64_t n) {
  Vec largest = splat(-INFINITY);
  const Vec limit = splat(FLT_MAX);
  uint32_t is_finite = 0xffff;
  for (int64_t i = 0; i < n; i += 16) {
    const Vec v = load_or(x + i, n - i, -INFINITY);
    is_finite &= less_equal(v, limit);
    largest = max(largest, v);
  }
  return {reduce_max(largest), is_finite == 0xffff};
}

int64_t row_find(const float* x, int64_t begin, int64_t n, float bound, bool or_equal) {
  const Vec limit = splat(bound);
  int64_t i = begin;
  for (; i + 16 <= n; i += 16) {
    const Vec v = load(x + i);
    const uint32_t found = or_equal ? less_equal(limit, v) : ~less_equal(v, limit) & 0xffffu;
    if (found != 0) return i + __builtin_ctz(found);
  }
  for (; i < n; ++i) {
    if (or_equal ? x[i] >= bound : x[i] > bound) return i;
  }
  return n;
}

void row_scale(const float* x, int64_t n, float max, float factor, float* out) {
  const Vec shift = splat(max), scale = splat(factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, (load(x + i) - shift) * scale);
  if (i < n) store_first(out + i, (load_first(x + i, n - i) - shift) * scale, n - i);
}

double row_mass(const float* x, int64_t n, float max, float floor) {
  const Vec shift = splat(max), least = splat(floor);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
    Vec sum = splat(0.0f);
    for (int64_t i = begin; i < end; i += 16) {
      const Vec v = load_or(x + i, end - i, -INFINITY);
      sum = sum + zero_above(exp(v - shift), least, v);
    }
    total += double(reduce_add(sum));
  }
  return total;
}

int64_t row_count(const float* x, int64_t n, float floor) {
  const Vec least = splat(floor);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    count += __builtin_popcount(less_equal(least, load_or(x + i, n - i, -INFINITY)));
  }
  return count;
}

int64_t row_compact(const float* x, int64_t n, float floor, float* out) {
  const Vec least = splat(floor);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    uint32_t kept = less_equal(least, load_or(x + i, n - i, -INFINITY));
    for (; kept != 0; kept &= kept - 1) out[count++] = x[i + __builtin_ctz(kept)];
  }
  return count;
}

int64_t row_race(const float* scores, int64_t n, float floor, const DrawKey& key) {
  const Vec least = splat(floor);
  double best = INFINITY;  // of log E - score
  int64_t winner = n;
  Vec reach = splat(INFINITY);  // e^best, and some more than the error of e^score below
  for (int64_t first = 0; first < n; first += kDraws) {
    uint32_t runs = 0;  // bit k: token first + k may be drawn
    for (int k = 0; k < kDraws && first + k < n; k += 16) {
      runs |= less_equal(least, load_or(scores + first + k, n - first - k, -INFINITY)) << k;
    }
    if (runs == 0) continue;
    alignas(64) uint32_t words[kDraws];
    philox(uint32_t(first), key.choice, key.position, key.seed, words);
    // -log(1 - u) >= u: who has u above e^best * e^score cannot win. Some ten a row are left.
    alignas(64) float uniforms[kDraws];
    for (int k = 0; k < kDraws; ++k) uniforms[k] = float(int32_t(words[k] >> 8)) * 0x1p-24f;
    uint32_t is_near = 0;
    for (int k = 0; k < kDraws && first + k < n; k += 16) {
      const Vec score = load_or(scores + first + k, n - first - k, -INFINITY);
      const Vec weight = max(exp(score), splat(FLT_MIN));
      is_near |= less_equal(load(uniforms + k), reach * weight) << k;
    }
    for (runs &= is_near; runs != 0; runs &= runs - 1) {
      const int k = __builtin_ctz(runs);
      const double uniform = (double(words[k]) + 0.5) * 0x1p-32;
      const double arrival = std::log(-std::log1p(-uniform)) - double(scores[first + k]);
      if (arrival < best) {
        best = arrival;
        winner = first + k;
        reach = splat(float(std::exp(best) * 1.0001) + FLT_MIN);
      }
    }
  }
  return winner;
}

}  // namespace tgi::cpu::TGI_ISA
