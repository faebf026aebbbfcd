// Short convolutions along a sequence. Included only by the step_<isa>.cpp files.
#pragma once

#include "../team.h"
#include "activations.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Channels processed together: their window stays in L1, and each row is read in whole cache lines,
// 512 bytes at a time.
constexpr int64_t kConvVectors = 8;
constexpr int64_t kVector = 16;
constexpr int64_t kConvChannels = kConvVectors * kVector;

// A ring buffer of the last inputs of some channels.
struct ConvWindow {
  alignas(64) float values[kMaxTaps - 1][kConvChannels];
};

// Loads sixteen channels of a row from c on, with zeros past the last channel.
template <class S>
inline typename S::F load_channels(const float* row, int64_t c, int64_t num_channels) {
  const int64_t left = num_channels - c;
  if (left >= kVector) return S::load(row + c);
  return left > 0 ? S::load_head(row + c, static_cast<int>(left), S::zero()) : S::zero();
}

// Processes one token. `first` is the index of the window's oldest input, which the token's own
// input replaces.
template <class S>
inline void convolve_token(const ShortConvParams& p, int64_t token, Range channels, int64_t first,
                           ConvWindow& window) {
  const int64_t width = p.padded_channels(), kept = p.num_taps - 1;
  const int64_t row = token * p.stride;
  float* const out = p.out + token * width;
  for (int64_t c = channels.begin; c < channels.end; c += kVector) {
    const int64_t at = c - channels.begin;
    auto u = load_channels<S>(p.in + row, c, p.num_channels);
    if (p.in_gate != nullptr) {
      u = S::mul(u, load_channels<S>(p.in_gate + row, c, p.num_channels));
    }
    auto sum = p.bias == nullptr ? S::zero() : S::load(p.bias + c);
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t place = first + k < kept ? first + k : first + k - kept;
      sum = S::fma(S::load(p.weight + k * width + c), S::load(window.values[place] + at), sum);
    }
    sum = S::fma(S::load(p.weight + kept * width + c), u, sum);
    S::store(window.values[first] + at, u);
    if (p.has_silu) sum = silu<S>(sum);
    if (p.out_gate != nullptr) {
      sum = S::mul(sum, load_channels<S>(p.out_gate + row, c, p.num_channels));
    }
    S::store(out + c, sum);
  }
}

template <class S>
inline void convolve_span(const ShortConvParams& p, const StateSpan& span, Range channels) {
  const int64_t width = p.padded_channels(), kept = p.num_taps - 1;
  const int64_t size = channels.end - channels.begin;
  ConvWindow window;
  for (int64_t k = 0; k < kept; ++k) {
    for (int64_t at = 0; at < size; at += kVector) {
      const auto known = span.from < 0
                             ? S::zero()
                             : S::load(p.state.of(span.from) + k * width + channels.begin + at);
      S::store(window.values[k] + at, known);
    }
  }
  int64_t first = 0;
  for (int64_t t = span.begin; t < span.end; ++t) {
    convolve_token<S>(p, t, channels, first, window);
    first = first + 1 < kept ? first + 1 : 0;
  }
  float* const to = p.state.of(span.to);
  for (int64_t k = 0; k < kept; ++k) {
    const int64_t place = first + k < kept ? first + k : first + k - kept;
    for (int64_t at = 0; at < size; at += kVector) {
      S::store(to + k * width + channels.begin + at, S::load(window.values[place] + at));
    }
  }
}

// Each member owns channels.
template <class S>
void short_conv(const ShortConvParams& p, const StepHeader& step, int member, int num_members) {
  const Range vectors = split(p.padded_channels() / kVector, member, num_members);
  const int64_t end = vectors.end * kVector;
  for (int64_t span = 0; span < step.num_state_spans; ++span) {
    for (int64_t c = vectors.begin * kVector; c < end; c += kConvChannels) {
      const int64_t stop = c + kConvChannels < end ? c + kConvChannels : end;
      convolve_span<S>(p, step.state_spans[span], {c, stop});
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
