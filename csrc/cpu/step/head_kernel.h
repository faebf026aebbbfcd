// What is computed of one head of one token in registers: norms, a clip and rotation. Included only
// by the step_<isa>.cpp files.
#pragma once

#include <cmath>

#include "linear_kernels.h"
#include "norm_kernel.h"

namespace tgi::cpu::step {
namespace {

// One head of one token: strips of 16 rotated pairs, first elements from panel 0, second elements
// from panel 1.
template <class S>
struct HeadRows {
  typename S::F first[kMaxUnitStrips];
  typename S::F second[kMaxUnitStrips];
};

// Returns the factor that the norm of a head applies to its `width` values, before the weight.
template <class S>
inline float norm_factor(const HeadRows<S>& head, int64_t num_strips, int64_t width, float eps) {
  auto squares = S::zero();
  for (int64_t i = 0; i < num_strips; ++i) {
    squares = S::fma(head.first[i], head.first[i], squares);
    squares = S::fma(head.second[i], head.second[i], squares);
  }
  const float mean = S::reduce_add(squares) / static_cast<float>(width);
  return 1.0f / std::sqrt(mean + eps);
}

// Multiplies a head by a factor, as a norm without a weight does.
template <class S>
inline void scale_head(HeadRows<S>& head, int64_t num_strips, float factor) {
  const auto each = S::set1(factor);
  for (int64_t i = 0; i < num_strips; ++i) {
    head.first[i] = S::mul(head.first[i], each);
    head.second[i] = S::mul(head.second[i], each);
  }
}

template <class S>
inline void scale_head(HeadRows<S>& head, int64_t num_strips, float factor, const float* weight) {
  const auto each = S::set1(factor);
  for (int64_t i = 0; i < num_strips; ++i) {
    head.first[i] = S::mul(S::mul(head.first[i], each), S::load(weight + 32 * i));
    head.second[i] = S::mul(S::mul(head.second[i], each), S::load(weight + 32 * i + 16));
  }
}

// Layer norm of a head. Its dims are the first `width` / 2 pairs; the rest is zero.
template <class S>
inline void layer_norm_head(HeadRows<S>& head, int64_t num_strips, int64_t width, float eps,
                            const float* weight, const float* bias) {
  auto sum = S::zero();
  for (int64_t i = 0; i < num_strips; ++i) sum = S::add(sum, S::add(head.first[i], head.second[i]));
  const float mean = S::reduce_add(sum) / static_cast<float>(width);
  const auto each_mean = S::set1(mean);
  auto squares = S::zero();
  for (int64_t i = 0; i < num_strips; ++i) {
    const auto left = static_cast<int>(width / 2 - 16 * i);
    const auto first = S::sub(S::select_head(left, head.first[i], each_mean), each_mean);
    const auto second = S::sub(S::select_head(left, head.second[i], each_mean), each_mean);
    squares = S::fma(first, first, S::fma(second, second, squares));
  }
  const float variance = S::reduce_add(squares) / static_cast<float>(width);
  const Moments moments = {mean, 1.0f / std::sqrt(variance + eps)};
  for (int64_t i = 0; i < num_strips; ++i) {
    const float *w = weight + 32 * i, *b = bias + 32 * i;
    head.first[i] = layer_norm<S>(head.first[i], moments, S::load(w), S::load(b));
    head.second[i] = layer_norm<S>(head.second[i], moments, S::load(w + 16), S::load(b + 16));
  }
}

template <class S>
inline void clip_head(HeadRows<S>& head, int64_t num_strips, float limit) {
  const auto most = S::set1(limit), least = S::set1(-limit);
  for (int64_t i = 0; i < num_strips; ++i) {  // this order keeps NaN
    head.first[i] = S::max(least, S::min(most, head.first[i]));
    head.second[i] = S::max(least, S::min(most, head.second[i]));
  }
}

template <class S>
inline void rotate(typename S::F& first, typename S::F& second, const float* cosines,
                   const float* sines) {
  const auto c = S::load(cosines), s = S::load(sines);
  const auto rotated = S::sub(S::mul(first, c), S::mul(second, s));
  second = S::fma(second, c, S::mul(first, s));
  first = rotated;
}

}  // namespace
}  // namespace tgi::cpu::step
