// Heads of the gated delta rule, token by token. Included only by the step_<isa>.cpp files.
//
//   a head's state    channels 0..15: [key_dim][16]    16..31: [key_dim][16]    ...
//
// Two vectors of channels are processed together. With a key of 128 their state is one contiguous
// piece of 16 KB, which stays in L1 while the keys and queries of several tokens, normed once for
// all of a head's channels, stream past.
#pragma once

#include <cmath>

#include "../team.h"
#include "short_conv_kernel.h"
#include "state_stores.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

constexpr int64_t kDeltaTokens = 8;
constexpr int kDeltaVectors = 2;
constexpr float kKeyEps = 1e-6f;

// The inputs of some tokens to one head.
struct DeltaTokens {
  alignas(64) float queries[kDeltaTokens][kMaxKeyDim];
  alignas(64) float keys[kDeltaTokens][kMaxKeyDim];
  float decay[kDeltaTokens];  // fraction of the state that is kept
  float rate[kDeltaTokens];   // fraction of the error that is corrected
};

// Divides a vector by its length and multiplies it by `scale`.
template <class S>
inline void norm_key(const float* in, int64_t size, float scale, float* out) {
  auto squares = S::zero();
  for (int64_t c = 0; c < size; c += kVector) {
    const auto x = load_channels<S>(in, c, size);
    squares = S::fma(x, x, squares);
  }
  const auto factor = S::set1(scale / std::sqrt(S::reduce_add(squares) + kKeyEps));
  for (int64_t c = 0; c < size; c += kVector) {
    S::store(out + c, S::mul(load_channels<S>(in, c, size), factor));
  }
}

// Computes the scalars in double, so that differences in the last bits of math libraries do not
// show.
template <class S>
inline void read_tokens(const DeltaRuleParams& p, int64_t first, int64_t count, int64_t head,
                        DeltaTokens& tokens) {
  const int64_t key_head =
      p.is_tiled ? head % p.num_key_heads : head / (p.num_heads / p.num_key_heads);
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.key_dim));
  for (int64_t t = 0; t < count; ++t) {
    const float* const query = p.in + (first + t) * p.in_stride + key_head * p.key_dim;
    norm_key<S>(query, p.key_dim, scale, tokens.queries[t]);
    norm_key<S>(query + p.num_key_heads * p.key_dim, p.key_dim, 1.0f, tokens.keys[t]);
    const float* const step = p.steps + (first + t) * p.steps_stride + head;
    const double raw = static_cast<double>(step[p.num_heads]) + p.dt_bias[head];
    const double soft = raw > 20 ? raw : std::log1p(std::exp(raw));
    tokens.decay[t] = static_cast<float>(std::exp(soft * p.a[head]));
    tokens.rate[t] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(step[0]))));
  }
}

// Processes one token for some vectors of a head's channels. On entry `found` is the state's value
// under the token's key; on return it is the new state's value under the next token's key, if there
// is a next token.
template <class S, int Vectors, bool HasNext, bool Streams>
inline void apply_token(const DeltaRuleParams& p, const DeltaTokens& tokens, int64_t t,
                        const float* values, const float* from, float* to,
                        typename S::F (&found)[Vectors], float* out) {
  const int64_t stride = p.key_dim * kVector;
  const float* const queries = tokens.queries[t];
  const float* const keys = tokens.keys[t];
  const float* const next = tokens.keys[HasNext ? t + 1 : t];
  const auto decay = S::set1(tokens.decay[t]), rate = S::set1(tokens.rate[t]);
  typename S::F change[Vectors], sums[Vectors], later[Vectors];
  TGI_UNROLL(2)
  for (int v = 0; v < Vectors; ++v) {
    change[v] = S::mul(rate, S::sub(S::load(values + v * kVector), S::mul(decay, found[v])));
    sums[v] = later[v] = S::zero();
  }
  for (int64_t n = 0; n < p.key_dim; ++n) {
    const auto key = S::set1(keys[n]), query = S::set1(queries[n]), following = S::set1(next[n]);
    TGI_UNROLL(2)
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = v * stride + n * kVector;
      const auto state = S::fma(key, change[v], S::mul(S::load(from + at), decay));
      store_state<S, Streams>(to + at, state);
      sums[v] = S::fma(state, query, sums[v]);
      if (HasNext) later[v] = S::fma(state, following, later[v]);
    }
  }
  TGI_UNROLL(2)
  for (int v = 0; v < Vectors; ++v) {
    S::store(out + v * kVector, sums[v]);
    found[v] = later[v];
  }
}

// Processes some tokens of a sequence. The first token reads `from`.
template <class S, int Vectors>
inline void apply_tokens(const DeltaRuleParams& p, const DeltaTokens& tokens, int64_t first,
                         int64_t count, int64_t column, const float* from, float* to,
                         bool streams) {
  const int64_t stride = p.key_dim * kVector;
  const float* const values = p.in + 2 * p.num_key_heads * p.key_dim + column;
  float* const out = p.out + column;
  typename S::F found[Vectors];
  TGI_UNROLL(2)
  for (int v = 0; v < Vectors; ++v) found[v] = S::zero();
  for (int64_t n = 0; n < p.key_dim; ++n) {
    const auto key = S::set1(tokens.keys[0][n]);
    TGI_UNROLL(2)
    for (int v = 0; v < Vectors; ++v) {
      found[v] = S::fma(S::load(from + v * stride + n * kVector), key, found[v]);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const float* const value = values + (first + t) * p.in_stride;
    float* const y = out + (first + t) * p.out_stride;
    if (t + 1 < count) {
      apply_token<S, Vectors, true, false>(p, tokens, t, value, from, to, found, y);
    } else if (streams) {
      apply_token<S, Vectors, false, true>(p, tokens, t, value, from, to, found, y);
    } else {
      apply_token<S, Vectors, false, false>(p, tokens, t, value, from, to, found, y);
    }
    from = to;
  }
}

// Processes vectors [begin, end) of a head's channels for all tokens of a span.
template <class S>
inline void apply_head(const DeltaRuleParams& p, const StateSpan& span, int64_t head, Range vectors,
                       DeltaTokens& tokens) {
  const int64_t stride = p.key_dim * kVector, of_head = p.head_dim / kVector;
  const int64_t offset = head * of_head * stride;
  float* const to = p.state.of(span.to) + offset;
  const float* from = span.from < 0 ? to : p.state.of(span.from) + offset;
  if (span.from < 0 || span.begin == span.end) {
    for (int64_t at = vectors.begin * stride; at < vectors.end * stride; at += kVector) {
      S::store(to + at, span.from < 0 ? S::zero() : S::load(from + at));
    }
  }
  const bool streams = streams_state(span, to);
  for (int64_t t = span.begin; t < span.end; t += kDeltaTokens) {
    const int64_t count = kDeltaTokens < span.end - t ? kDeltaTokens : span.end - t;
    read_tokens<S>(p, t, count, head, tokens);
    for (int64_t v = vectors.begin; v < vectors.end;) {
      const int64_t column = head * p.head_dim + v * kVector;
      if (vectors.end - v >= kDeltaVectors) {
        apply_tokens<S, kDeltaVectors>(p, tokens, t, count, column, from + v * stride,
                                       to + v * stride, streams);
        v += kDeltaVectors;
      } else {
        apply_tokens<S, 1>(p, tokens, t, count, column, from + v * stride, to + v * stride,
                           streams);
        ++v;
      }
    }
    from = to;
  }
}

// Each member owns channels: whole heads and parts of heads.
template <class S>
void delta_rule(const DeltaRuleParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t of_head = p.head_dim / kVector, num_vectors = p.num_heads * of_head;
  const Range mine = split(num_vectors, member, num_members);
  DeltaTokens tokens;
  for (int64_t span = 0; span < step.num_state_spans; ++span) {
    for (int64_t i = mine.begin; i < mine.end;) {
      const int64_t head = i / of_head, first = i - head * of_head;
      const int64_t left = mine.end - i, size = of_head - first < left ? of_head - first : left;
      apply_head<S>(p, step.state_spans[span], head, {first, first + size}, tokens);
      i += size;
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

}  // namespace
}  // namespace tgi::cpu::step
