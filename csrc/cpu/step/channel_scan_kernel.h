// Channels with a state each, token by token. Included only by the step_<isa>.cpp files.
//
//   the states    channels 0..15: [state_size][16]    16..31: [state_size][16]    ...
//
// The decay of each number of a state is an exponential of its own, so that the arithmetic of 2^x
// is most of the work: several vectors of channels are processed together, whose exponentials are
// independent of each other, and whose inputs are whole cache lines.
#pragma once

#include "../team.h"
#include "activations.h"
#include "short_conv_kernel.h"
#include "state_stores.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// log(1 + e^x), with a relative error of 2e-7 near zero: max(x, 0) + log(1 + e), where e = e^-|x|
// and log(1 + e) = 2 atanh(e / (2 + e)), by its series.
template <class S>
inline typename S::F softplus(typename S::F x) {
  const auto size = S::as_float(S::abs_bits(x));
  const auto e = exp2_below_128<S, false>(S::mul(size, S::set1(-kFloatLog2E)));
  const auto ratio = S::div(e, S::add(S::set1(2.0f), e));
  const auto square = S::mul(ratio, ratio);
  auto p = S::set1(2.0f / 13);
  p = S::fma(p, square, S::set1(2.0f / 11));
  p = S::fma(p, square, S::set1(2.0f / 9));
  p = S::fma(p, square, S::set1(2.0f / 7));
  p = S::fma(p, square, S::set1(2.0f / 5));
  p = S::fma(p, square, S::set1(2.0f / 3));
  p = S::fma(p, square, S::set1(2.0f));
  return S::fma(p, ratio, S::max(S::zero(), x));  // this order keeps NaN
}

// Processes `Vectors` vectors of channels, starting at channel c, for one token; reads their states
// at `from` and writes them to `to`.
template <class S, int Vectors, bool Streams>
inline void scan_channels(const ChannelScanParams& p, int64_t token, int64_t c, const float* from,
                          float* to) {
  const int64_t size = p.state_size;
  const float* const x = p.x + token * p.x_stride + c;
  const float* const steps = p.steps + token * p.steps_stride + c;
  const float* const write = p.parts + token * p.parts_stride;
  const float* const read = write + size;
  const float* const rates = p.a + c * size;
  typename S::F dt[Vectors], added[Vectors], sums[Vectors];
  TGI_UNROLL(4)
  for (int v = 0; v < Vectors; ++v) {
    dt[v] = softplus<S>(S::load(steps + v * kVector));
    added[v] = S::mul(dt[v], S::load(x + v * kVector));
    sums[v] = S::zero();
  }
  for (int64_t n = 0; n < size; ++n) {
    const auto in = S::set1(write[n]), out = S::set1(read[n]);
    TGI_UNROLL(4)
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = (v * size + n) * kVector;
      const auto decay = exp2_below_128<S, false>(S::mul(dt[v], S::load(rates + at)));
      const auto state = S::fma(added[v], in, S::mul(S::load(from + at), decay));
      store_state<S, Streams>(to + at, state);
      sums[v] = S::fma(state, out, sums[v]);
    }
  }
  const float* const gates = p.gate + token * p.gate_stride + c;
  float* const y = p.out + token * p.out_stride + c;
  TGI_UNROLL(4)
  for (int v = 0; v < Vectors; ++v) {
    const auto direct = S::load(p.d + c + v * kVector);
    const auto sum = S::fma(direct, S::load(x + v * kVector), sums[v]);
    S::store(y + v * kVector, S::mul(sum, silu<S>(S::load(gates + v * kVector))));
  }
}

template <class S, int Vectors>
inline void scan_channel_spans(const ChannelScanParams& p, const StepHeader& step, int64_t c) {
  const int64_t offset = c * p.state_size, count = Vectors * p.state_size * kVector;
  for (int64_t index = 0; index < step.num_state_spans; ++index) {
    const StateSpan& span = step.state_spans[index];
    float* const to = p.state.of(span.to) + offset;
    const float* from = span.from < 0 ? to : p.state.of(span.from) + offset;
    if (span.from < 0 || span.begin == span.end) {
      for (int64_t at = 0; at < count; at += kVector) {
        S::store(to + at, span.from < 0 ? S::zero() : S::load(from + at));
      }
    }
    if (streams_state(span, to)) {
      scan_channels<S, Vectors, true>(p, span.begin, c, from, to);
      continue;
    }
    for (int64_t t = span.begin; t < span.end; ++t) {
      scan_channels<S, Vectors, false>(p, t, c, from, to);
      from = to;
    }
  }
}

// Each member owns channels.
template <class S>
void channel_scan(const ChannelScanParams& p, const StepHeader& step, int member, int num_members) {
  constexpr int kAtOnce = S::kNumRegisters >= 32 ? 4 : 1;
  const int64_t num_vectors = p.num_channels / kVector;
  const Range mine = split(num_vectors, member, num_members);
  int64_t i = mine.begin;
  for (; i + kAtOnce <= mine.end; i += kAtOnce) {
    scan_channel_spans<S, kAtOnce>(p, step, i * kVector);
  }
  for (; i < mine.end; ++i) scan_channel_spans<S, 1>(p, step, i * kVector);
  S::end_stream();
  if (member + 1 < num_members) return;
  for (int64_t token = 0; token < step.num_tokens; ++token) {
    for (int64_t c = p.num_channels; c < p.out_stride; c += kVector) {
      S::store(p.out + token * p.out_stride + c, S::zero());
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
