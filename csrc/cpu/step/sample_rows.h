// The passes over a row of logits that sampling is built from, over the simd type S. Included only
// by the step_<isa>.cpp files.
#pragma once

#include <cfloat>
#include <cmath>

#include "../sample.h"
#include "philox.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Loads the next sixteen values of a row of which `left` remain, with -infinity past its end.
template <class S>
inline typename S::F load_row(const float* x, int64_t left) {
  return left >= 16 ? S::load(x) : S::load_head(x, static_cast<int>(left), S::set1(-INFINITY));
}

// Calls visit(index, sixteen values) along a row; values past its end are -infinity.
template <class S, class Visit>
inline void each_sixteen(const float* x, int64_t begin, int64_t end, const Visit& visit) {
  int64_t i = begin;
  TGI_UNROLL(2)
  for (; i + 16 <= end; i += 16) visit(i, S::load(x + i));
  if (i < end) visit(i, load_row<S>(x + i, end - i));
}

// Returns e^x for x <= 0, but never less than 2^-125, which is negligible next to the best score's
// 1. Relative error about 1e-7 * (1 + |x| / 2).
template <class S>
inline typename S::F weight_of(const typename S::F& x) {
  const auto y = S::max(S::mul(x, S::set1(static_cast<float>(kLog2E))), S::set1(-125.0f));
  const auto whole = S::nearest(y);
  const auto f = S::sub(y, whole);
  auto p = S::set1(1.535336188319500e-4f);
  p = S::mul_add(p, f, S::set1(1.339887440266574e-3f));
  p = S::mul_add(p, f, S::set1(9.618437357674640e-3f));
  p = S::mul_add(p, f, S::set1(5.550332471162809e-2f));
  p = S::mul_add(p, f, S::set1(2.402264791363012e-1f));
  p = S::mul_add(p, f, S::set1(6.931472028550421e-1f));
  p = S::mul_add(p, f, S::set1(1.0f));
  return S::mul_pow2(p, whole);
}

template <class S>
RowStats row_stats(const float* x, int64_t n) {
  auto largest = S::set1(-INFINITY);
  auto bits = S::izero();  // above the bits of infinity if there is a NaN, whatever its sign
  each_sixteen<S>(x, 0, n, [&](int64_t, typename S::F v) {
    bits = S::imax(bits, S::abs_bits(v));
    largest = S::max(largest, v);
  });
  const float max = S::reduce_max(largest);
  return {max, S::reduce_imax(bits) <= 0x7F800000 && max < INFINITY};
}

template <class S, bool OrEqual>
int64_t find_first(const float* x, int64_t begin, int64_t n, float bound) {
  const auto limit = S::set1(bound);
  const auto found_in = [&](typename S::F v) {
    return OrEqual ? S::less_equal(limit, v) : S::less_equal(v, limit) ^ 0xFFFFu;
  };
  int64_t i = begin;
  for (; i + 32 <= n; i += 32) {
    const uint32_t found = found_in(S::load(x + i)) | found_in(S::load(x + i + 16)) << 16;
    if (found != 0) return i + __builtin_ctz(found);
  }
  for (; i < n; i += 16) {
    const uint32_t found = found_in(load_row<S>(x + i, n - i));
    if (found != 0) return i + __builtin_ctz(found);
  }
  return n;
}

template <class S>
int64_t row_find(const float* x, int64_t begin, int64_t n, float bound, bool or_equal) {
  return or_equal ? find_first<S, true>(x, begin, n, bound)
                  : find_first<S, false>(x, begin, n, bound);
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

// Sums at most kSumBlock values.
template <class S>
inline double block_mass(const float* x, int64_t n, float max, float floor) {
  const auto shift = S::set1(max), least = S::set1(floor);
  auto sum = S::zero();
  if (floor <= -FLT_MAX) {  // only -infinity is below, and its weight is negligible
    each_sixteen<S>(x, 0, n, [&](int64_t, typename S::F v) {
      sum = S::add(sum, weight_of<S>(S::sub(v, shift)));
    });
  } else {
    each_sixteen<S>(x, 0, n, [&](int64_t, typename S::F v) {
      sum = S::add_less_equal(sum, least, v, weight_of<S>(S::sub(v, shift)));
    });
  }
  return double(S::reduce_add(sum));
}

template <class S, class Visit>
inline void each_block_mass(const float* x, int64_t n, float max, float floor, const Visit& visit) {
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    visit(block_mass<S>(x + begin, n - begin < kSumBlock ? n - begin : kSumBlock, max, floor));
  }
}

template <class S>
double row_mass(const float* x, int64_t n, float max, float floor) {
  double total = 0;
  each_block_mass<S>(x, n, max, floor, [&](double sum) { total += sum; });
  return total;
}

template <class S>
void row_masses(const float* x, int64_t n, float max, float floor, double* sums) {
  each_block_mass<S>(x, n, max, floor, [&](double sum) { *sums++ = sum; });
}

template <class S>
int64_t row_compact(const float* x, int64_t n, float floor, float* out) {
  const auto least = S::set1(floor);
  int64_t count = 0;
  each_sixteen<S>(x, 0, n, [&](int64_t i, typename S::F v) {
    uint32_t kept = S::less_equal(least, v);
    for (; kept != 0; kept &= kept - 1) out[count++] = x[i + __builtin_ctz(kept)];
  });
  return count;
}

template <class S>
RaceWinner row_race(const float* scores, int64_t begin, int64_t n, float floor,
                    const SampleKey& key) {
  const auto least = S::set1(floor);
  double best = INFINITY;  // lowest log E - score so far
  int64_t winner = n;
  auto reach = S::set1(INFINITY);  // e^best, plus a margin above the error of e^score below
  for (int64_t first = begin; first < n; first += kCounters) {
    uint32_t runs = 0;  // bit k: token first + k may be sampled
    for (int k = 0; k < kCounters && first + k < n; k += 16) {
      runs |= S::less_equal(least, load_row<S>(scores + first + k, n - first - k)) << k;
    }
    if (runs == 0) continue;
    alignas(64) uint32_t words[kCounters];
    philox<S>(static_cast<uint32_t>(first), key, words);
    // -log(1 - u) >= u, so a token with u above e^best * e^score cannot win. About ten tokens per
    // row remain.
    uint32_t is_near = 0;
    for (int k = 0; k < kCounters && first + k < n; k += 16) {
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
  return {winner, best};
}

template <class S>
constexpr RowPasses make_row_passes() {
  return {row_stats<S>,  row_find<S>,    row_scale<S>, row_mass<S>,
          row_masses<S>, row_compact<S>, row_race<S>};
}

}  // namespace
}  // namespace tgi::cpu::step
