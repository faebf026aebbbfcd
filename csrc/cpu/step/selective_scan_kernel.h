// State-space heads, token by token, and the gated norm that follows them. Included only by the
// step_<isa>.cpp files.
#pragma once

#include <cmath>

#include "../team.h"
#include "activations.h"
#include "short_conv_kernel.h"
#include "state_stores.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

constexpr int kScanVectors = 4;  // vectors of a head's channels processed together

// A token's time step for one head, and the fraction of the state that is kept. Computed in double,
// so that differences in the last bits of math libraries do not show.
struct HeadStep {
  float dt;
  float decay;
};

inline HeadStep head_step(const SelectiveScanParams& p, int64_t token, int64_t head) {
  const double raw =
      static_cast<double>(p.dt[token * p.dt_stride + head]) * p.dt_scale + p.dt_bias[head];
  const double soft = raw > 20 ? raw : std::log1p(std::exp(raw));
  auto dt = static_cast<float>(soft);
  dt = dt < p.dt_low ? p.dt_low : dt > p.dt_high ? p.dt_high : dt;
  return {dt, static_cast<float>(std::exp(static_cast<double>(dt) * p.a[head]))};
}

// Processes `Vectors` vectors of a head's channels, starting at channel c, for one token; reads the
// state at `from` and writes it to `to`.
template <class S, int Vectors, bool Streams>
inline void scan_token(const SelectiveScanParams& p, int64_t token, int64_t head, int64_t c,
                       const float* from, float* to) {
  const int64_t width = p.num_heads * p.head_dim, group = head / (p.num_heads / p.num_groups);
  const float* const row = p.in + token * p.in_stride;
  const float* const x = row + head * p.head_dim + c;
  const float* const b = row + width + group * p.state_size;
  const float* const read = b + p.num_groups * p.state_size;
  const HeadStep step = head_step(p, token, head);
  const auto decay = S::set1(step.decay), dt = S::set1(step.dt), direct = S::set1(p.d[head]);
  typename S::F inputs[Vectors], sums[Vectors];
  TGI_UNROLL(4)
  for (int v = 0; v < Vectors; ++v) {
    inputs[v] = S::mul(dt, S::load(x + v * kVector));
    sums[v] = S::zero();
  }
  for (int64_t n = 0; n < p.state_size; ++n) {
    const auto in = S::set1(b[n]), out = S::set1(read[n]);
    const int64_t at = n * p.head_dim;
    TGI_UNROLL(4)
    for (int v = 0; v < Vectors; ++v) {
      const auto kept = S::mul(S::load(from + at + v * kVector), decay);
      const auto state = S::fma(inputs[v], in, kept);
      store_state<S, Streams>(to + at + v * kVector, state);
      sums[v] = S::fma(state, out, sums[v]);
    }
  }
  float* const y = p.out + token * p.out_stride + head * p.head_dim + c;
  TGI_UNROLL(4)
  for (int v = 0; v < Vectors; ++v) {
    S::store(y + v * kVector, S::fma(direct, S::load(x + v * kVector), sums[v]));
  }
}

template <class S, int Vectors>
inline void scan_span(const SelectiveScanParams& p, const StateSpan& span, int64_t head,
                      int64_t c) {
  const int64_t offset = head * p.state_size * p.head_dim + c;
  float* const to = p.state.of(span.to) + offset;
  const float* from = span.from < 0 ? to : p.state.of(span.from) + offset;
  if (span.from < 0 || span.begin == span.end) {
    for (int64_t n = 0; n < p.state_size; ++n) {
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = n * p.head_dim + v * kVector;
        S::store(to + at, span.from < 0 ? S::zero() : S::load(from + at));
      }
    }
  }
  if (streams_state(span, to)) {
    scan_token<S, Vectors, true>(p, span.begin, head, c, from, to);
    return;
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    scan_token<S, Vectors, false>(p, t, head, c, from, to);
    from = to;
  }
}

// Each member owns channels: whole heads or parts of heads.
template <class S>
void selective_scan(const SelectiveScanParams& p, const StepHeader& step, int member,
                    int num_members) {
  const int64_t of_head = p.head_dim / kVector, num_vectors = p.num_heads * of_head;
  const Range mine = split(num_vectors, member, num_members);
  for (int64_t index = 0; index < step.num_state_spans; ++index) {
    const StateSpan& span = step.state_spans[index];
    for (int64_t i = mine.begin; i < mine.end;) {
      const int64_t head = i / of_head, first = i % of_head, c = first * kVector;
      const int64_t left = of_head - first < mine.end - i ? of_head - first : mine.end - i;
      if (left >= kScanVectors) {
        scan_span<S, kScanVectors>(p, span, head, c);
        i += kScanVectors;
      } else {
        scan_span<S, 1>(p, span, head, c);
        ++i;
      }
    }
  }
  S::end_stream();
  if (member + 1 < num_members) return;
  for (int64_t token = 0; token < step.num_tokens; ++token) {
    for (int64_t c = num_vectors * kVector; c < p.out_stride; c += kVector) {
      S::store(p.out + token * p.out_stride + c, S::zero());
    }
  }
}

// Returns the factor that a gate applies.
template <class S>
inline typename S::F gate_factor(const GatedNormParams& p, const float* gates, int64_t c,
                                 int64_t end) {
  const auto given =
      p.gate_width == 1 ? load_channels<S>(gates, c, end) : S::set1(gates[c / p.gate_width]);
  const auto gate = S::mul(S::set1(p.gate_scale), given);
  return p.is_sigmoid ? sigmoid<S>(gate) : silu<S>(gate);
}

// Norms and gates one group of a row's columns.
template <class S>
inline void gate_group(const GatedNormParams& p, int64_t token, Range columns) {
  const float* const rows = p.rows + token * p.stride;
  const float* const gates = p.gate + token * p.gate_stride;
  float* const out = p.out + token * p.out_stride;
  const auto value = [&](int64_t c) {
    const auto x = load_channels<S>(rows, c, columns.end);
    return p.is_gate_first ? S::mul(x, gate_factor<S>(p, gates, c, columns.end)) : x;
  };
  auto factor = S::set1(1.0f);
  if (p.weight != nullptr) {
    auto squares = S::zero();
    for (int64_t c = columns.begin; c < columns.end; c += kVector) {
      const auto x = value(c);
      squares = S::fma(x, x, squares);
    }
    const float mean = S::reduce_add(squares) / static_cast<float>(columns.end - columns.begin);
    factor = S::set1(1.0f / std::sqrt(mean + p.eps));
  }
  for (int64_t c = columns.begin; c < columns.end; c += kVector) {
    auto x = value(c);
    if (p.weight != nullptr) {
      x = S::mul(S::mul(x, factor), load_channels<S>(p.weight, c, columns.end));
    }
    if (!p.is_gate_first) x = S::mul(x, gate_factor<S>(p, gates, c, columns.end));
    const int64_t left = columns.end - c;
    S::store_head(out + c, static_cast<int>(left < kVector ? left : kVector), x);
  }
}

template <class S>
void gated_norm(const GatedNormParams& p, const StepHeader& step, int member, int num_members) {
  const Range tokens = split(step.num_tokens, member, num_members);
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    for (int64_t c = 0; c < p.width; c += p.group_width) {
      gate_group<S>(p, token, {c, c + p.group_width});
    }
    for (int64_t c = p.width; c < p.out_stride; ++c) p.out[token * p.out_stride + c] = 0;
  }
}

}  // namespace
}  // namespace tgi::cpu::step
