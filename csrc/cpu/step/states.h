// What a recurrent layer keeps of a sequence, and the operators that read and write it. Plain
// structs, as in step.h.
//
//   a pool     slot 0: place 0 | place 1     slot 1: place 2 | place 3     ...     kept ones
//   a step     reads the place that has as many tokens as the sequence has had, writes the other
//
// (With drafts a slot has two rows of places instead: a state is left behind each token of a draft,
// as it is not known how many of them will have been right.)
//
// So a step that fails, or turns out to be void, leaves the state that it began with. A sequence's
// tokens go in one after the other, in prompts as in decode: its bits do not depend on the steps.
//
// What is to be kept of a sequence is written in passing: its tokens are cut into spans there.
//
//   tokens 100..119 of slot 0, kept in place 9 in front of 112     100..111: 0 -> 9, 112..119: 9 ->
//   1
#pragma once

#include <cstdint>

#include "packed.h"

namespace tgi::cpu::step {

constexpr int64_t kMaxTaps = 16;     // of a short convolution
constexpr int64_t kMaxKeyDim = 256;  // of the gated delta rule

// Tokens of a sequence that go through its state, which goes from a place of a pool to another:
// negative where it begins with nothing. Without a token it is copied.
struct StateSpan {
  int32_t begin, end;  // of the step's tokens
  int32_t from, to;
};

// One layer's part of the places of a pool.
struct StateView {
  uint8_t* data;
  int64_t stride;  // bytes from a place to the next

  float* of(int64_t place) const { return reinterpret_cast<float*>(data + place * stride); }
};

// A causal convolution of each channel along its sequence, over so many tokens:
// out = out_gate * f(sum of weight[k] * u[t - num_taps + 1 + k] + bias), where u = in * in_gate.
struct ShortConvParams {
  const float* in;        // [num_tokens, stride], the channels first
  const float* in_gate;   // the same, or null
  const float* out_gate;  // the same, or null
  int64_t stride;
  int64_t num_channels;
  int64_t num_taps;     // 2 to kMaxTaps
  const float* weight;  // [num_taps, padded channels], the oldest token's first
  const float* bias;    // [padded channels], or null
  bool has_silu;
  StateView state;  // [num_taps - 1, padded channels] of u, the oldest first
  float* out;       // [num_tokens, padded channels], zero behind the channels

  int64_t padded_channels() const { return padded_columns(num_channels); }
};

// State spaces of heads: a token decays a head's state and adds to it, and reads it out:
// state = e^(dt * a) * state + dt * x * B, out = state . C + d * x, where dt = softplus(dt_scale *
// dt
// + bias).
// Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7.
struct SelectiveScanParams {
  const float* in;  // [num_tokens, in_stride]: x [heads, head_dim], B and C [groups, state_size]
  int64_t in_stride;
  const float* dt;  // [num_tokens, dt_stride], of each head
  int64_t dt_stride;
  int64_t num_heads;
  int64_t head_dim;    // a multiple of 16
  int64_t num_groups;  // of heads, which share B and C
  int64_t state_size;
  const float* a;        // [num_heads], negative
  const float* d;        // [num_heads]
  const float* dt_bias;  // [num_heads]
  float dt_scale;
  float dt_low, dt_high;  // what dt is cut to
  StateView state;        // [num_heads, state_size, head_dim]
  float* out;             // [num_tokens, out_stride], zero behind the heads
  int64_t out_stride;
};

// The gated delta rule: a token decays a head's state, and corrects what that has under its key.
// state = e^(a * softplus(step + bias)) * state; state += k (rate * (v - k . state)); out = q .
// state, where rate = sigmoid of another step, k and q are normed, and q is divided by
// sqrt(key_dim). Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464,
// section 3.
struct DeltaRuleParams {
  const float* in;  // [num_tokens, in_stride]: q, k [key heads, key_dim], v [heads, head_dim]
  int64_t in_stride;
  const float* steps;  // [num_tokens, steps_stride]: of each head that of its rate, of its decay
  int64_t steps_stride;
  int64_t num_heads;
  int64_t head_dim;       // a multiple of 16
  int64_t num_key_heads;  // which divides the heads
  int64_t key_dim;        // up to kMaxKeyDim
  bool is_tiled;          // head h has the key of h % num_key_heads, else neighbours have one
  const float* a;         // [num_heads], negative
  const float* dt_bias;   // [num_heads]
  StateView state;        // [num_heads, head_dim / 16, key_dim, 16]
  float* out;             // [num_tokens, out_stride], zero behind the heads
  int64_t out_stride;
};

// Rows and gates, normed by groups of columns: norm(rows * f(s * gate)), or norm(rows) * f(s *
// gate).
struct GatedNormParams {
  const float* rows;  // [num_tokens, stride]
  int64_t stride;
  const float* gate;  // [num_tokens, gate_stride]
  int64_t gate_stride;
  int64_t width;        // columns
  int64_t group_width;  // which divides it
  const float* weight;  // [width], or null: nothing is normed
  float eps;
  bool is_gate_first;
  bool is_sigmoid;   // f is the sigmoid, else silu
  float gate_scale;  // s
  float* out;        // [num_tokens, out_stride], zero behind the columns
  int64_t out_stride;
};

}  // namespace tgi::cpu::step
