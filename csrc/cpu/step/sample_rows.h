// The passes over a row of logits that sampling is made of, over the simd type S. Included by the
// step_<isa>.cpp files only.
#pragma once

#include <cfloat>
#include <cmath>

#include "../sample.h"
#include "philox.h"

namespace tgi::cpu::step {
namespace {

// Sums of this many values are made in float32, their sum in double: relative error below 1e-6.
constexpr int64_t kSumBlock = 16 * 64;

// The next sixteen of a row of which `left` remain; -infinity behind its end.
template <class S>
inline typename S::F load_row(const float* x, int64_t left) {
  return left >= 16 ? S::load(x) : S::load_head(x, static_cast<int>(left), S::set1(-INFINITY));
}

// e^x for x <= 0, and 2^-125 for all below that, which is nothing beside the best score's 1.
// Relative error about 1e-7 * (1 + |x| / 2).
template <class S>
inline typename S::F weight_of(typename S::F x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
  const auto magic = S::set1(12582912.0f);
  const auto y = S::max(S::mul(x, S::set1(1.44269504088896341f)), S::set1(-125.0f));
  const auto whole = S::add(y, magic);
  const auto f = S::sub(y, S::sub(whole, magic));
  auto p = S::set1(1.535336188319500e-4f);
  p = S::mul_add(p, f, S::set1(1.339887440266574e-3f));
  p = S::mul_add(p, f, S::set1(9.618437357674640e-3f));
  p = S::mul_add(p, f, S::set1(5.550332471162809e-2f));
  p = S::mul_add(p, f, S::set1(2.402264791363012e-1f));
  p = S::mul_add(p, f, S::set1(6.931472028550421e-1f));
  p = S::mul_add(p, f, S::set1(1.0f));
  return S::as_float(S::iadd(S::as_int(p), S::ishl(S::as_int(whole), 23)));
}

template <class S>
RowStats row_stats(const float* x, int64_t n) {
  auto largest = S::set1(-INFINITY);
  const auto limit = S::set1(FLT_MAX);
  uint32_t is_finite = 0xFFFF;
  for (int64_t i = 0; i < n; i += 16) {
    const auto v = load_row<S>(x + i, n - i);
    is_finite &= S::less_equal(v, limit);
    largest = S::max(largest, v);
  }
  return {S::reduce_max(largest), is_finite == 0xFFFF};
}

template <class S>
int64_t row_find(const float* x, int64_t begin, int64_t n, float bound, bool or_equal) {
  const auto limit = S::set1(bound);
  int64_t i = begin;
  for (; i + 16 <= n; i += 16) {
    const auto v = S::load(x + i);
    const uint32_t found = or_equal ? S::less_equal(limit, v) : S::less_equal(v, limit) ^ 0xFFFFu;
    if (found != 0) return i + __builtin_ctz(found);
  }
  for (; i < n; ++i) {
    if (or_equal ? x[i] >= bound : x[i] > bound) return i;
  }
  return n;
}

template <class S>
void row_scale(const float* x, int64_t n, float max, float factor, float* out) {
  const auto shift = S::set1(max), scale = S::set1(factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) S::store(out + i, S::mul(S::sub(S::load(x + i), shift), scale));
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  S::store_head(out + i, left, S::mul(S::sub(S::load_head(x + i, left, shift), shift), scale));
}

template <class S>
double row_mass(const float* x, int64_t n, float max, float floor) {
  const auto shift = S::set1(max), least = S::set1(floor);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
    auto sum = S::zero();
    for (int64_t i = begin; i < end; i += 16) {
      const auto v = load_row<S>(x + i, end - i);
      const auto weight = weight_of<S>(S::sub(v, shift));
      sum = S::add(sum, S::keep_less_equal(least, v, weight));
    }
    total += double(S::reduce_add(sum));
  }
  return total;
}

template <class S>
int64_t row_compact(const float* x, int64_t n, float floor, float* out) {
  const auto least = S::set1(floor);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    uint32_t kept = S::less_equal(least, load_row<S>(x + i, n - i));
    for (; kept != 0; kept &= kept - 1) out[count++] = x[i + __builtin_ctz(kept)];
  }
  return count;
}

template <class S>
int64_t row_race(const float* scores, int64_t n, float floor, const DrawKey& key) {
  const auto least = S::set1(floor);
  double best = INFINITY;  // of log E - score
  int64_t winner = n;
  auto reach = S::set1(INFINITY);  // e^best, and some more than the error of e^score below
  for (int64_t first = 0; first < n; first += kDraws) {
    uint32_t runs = 0;  // bit k: token first + k may be drawn
    for (int k = 0; k < kDraws && first + k < n; k += 16) {
      runs |= S::less_equal(least, load_row<S>(scores + first + k, n - first - k)) << k;
    }
    if (runs == 0) continue;
    alignas(64) uint32_t words[kDraws];
    philox<S>(static_cast<uint32_t>(first), key, words);
    // -log(1 - u) >= u: who has u above e^best * e^score cannot win. Some ten a row are left.
    uint32_t is_near = 0;
    for (int k = 0; k < kDraws && first + k < n; k += 16) {
      const auto uniform = S::mul(S::to_float(S::ishr(S::iload(words + k), 8)), S::set1(0x1p-24f));
      const auto weight = weight_of<S>(load_row<S>(scores + first + k, n - first - k));
      is_near |= S::less_equal(uniform, S::mul(reach, weight)) << k;
    }
    for (runs &= is_near; runs != 0; runs &= runs - 1) {
      const int k = __builtin_ctz(runs);
      const double uniform = (double(words[k]) + 0.5) * 0x1p-32;
      const double arrival = std::log(-std::log1p(-uniform)) - double(scores[first + k]);
      if (arrival < best) {
        best = arrival;
        winner = first + k;
        reach = S::set1(float(std::exp(best) * 1.0001) + FLT_MIN);
      }
    }
  }
  return winner;
}

template <class S>
constexpr RowPasses make_row_passes() {
  return {row_stats<S>, row_find<S>, row_scale<S>, row_mass<S>, row_compact<S>, row_race<S>};
}

}  // namespace
}  // namespace tgi::cpu::step
