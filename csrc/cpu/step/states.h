// The state that a recurrent layer keeps for each sequence, and the operators that read and write
// it. Plain structs, as in step.h.
//
//   a pool     slot 0: place 0 | place 1     slot 1: place 2 | place 3     ...     kept states
//   a step     reads the place whose number of tokens is the sequence's, writes the other
//
// (With speculative decoding a slot has two rows of places instead: a state is saved after each
// draft token, because it is not known yet how many drafts will be accepted.)
//
// A step that fails or is discarded therefore leaves the state that it began with. A sequence's
// tokens are processed one at a time, in prefill as in decode, so its bits do not depend on how
// they are divided into steps.
//
// States to be kept are written in passing: a sequence's tokens are cut into spans at those points.
//
//   tokens 100..119 of slot 0, the state before token 112 kept in place 9:
//   100..111: 0 -> 9, 112..119: 9 -> 1
#pragma once

#include <cstdint>

#include "packed.h"

namespace tgi::cpu::step {

constexpr int64_t kMaxTaps = 16;     // of a short convolution
constexpr int64_t kMaxKeyDim = 256;  // of the gated delta rule

// Tokens of a sequence that advance its state from one place of a pool to another. `from` is
// negative if the state starts at zero. A span without tokens copies the state.
struct StateSpan {
  int32_t begin, end;  // range of the step's tokens
  int32_t from, to;
};

// One layer's part of the places of a pool.
struct StateView {
  uint8_t* data;
  int64_t stride;  // bytes from one place to the next

  float* of(int64_t place) const { return reinterpret_cast<float*>(data + place * stride); }
};

// A causal convolution of each channel along its sequence, over `num_taps` tokens:
//   out = out_gate * f(sum of weight[k] * u[t - num_taps + 1 + k] + bias), where u = in * in_gate
struct ShortConvParams {
  const float* in;        // [num_tokens, stride], the channels first
  const float* in_gate;   // same shape, or null
  const float* out_gate;  // same shape, or null
  int64_t stride;
  int64_t num_channels;
  int64_t num_taps;     // 2 to kMaxTaps
  const float* weight;  // [num_taps, padded channels], oldest token first
  const float* bias;    // [padded channels], or null
  bool has_silu;
  StateView state;  // [num_taps - 1, padded channels] of u, oldest first
  float* out;       // [num_tokens, padded channels], zero past the channels

  int64_t padded_channels() const { return padded_columns(num_channels); }
};

// State-space heads. Each token decays a head's state, adds to it, and reads it out:
//   dt    = softplus(dt_scale * dt + bias)
//   state = e^(dt * a) * state + dt * x * B
//   out   = state . C + d * x
// Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7.
struct SelectiveScanParams {
  const float* in;  // [num_tokens, in_stride]: x [heads, head_dim], B and C [groups, state_size]
  int64_t in_stride;
  const float* dt;  // [num_tokens, dt_stride], one per head
  int64_t dt_stride;
  int64_t num_heads;
  int64_t head_dim;    // a multiple of 16
  int64_t num_groups;  // groups of heads that share B and C
  int64_t state_size;
  const float* a;        // [num_heads], negative
  const float* d;        // [num_heads]
  const float* dt_bias;  // [num_heads]
  float dt_scale;
  float dt_low, dt_high;  // bounds that dt is clipped to
  StateView state;        // [num_heads, state_size, head_dim]
  float* out;             // [num_tokens, out_stride], zero past the heads
  int64_t out_stride;
};

// Channels with a state of `state_size` numbers each. Each token decays every number by itself,
// adds to it, and reads it out:
//   dt    = softplus(step)
//   state = 2^(dt * a) * state + dt * x * B
//   out   = (state . C + d * x) * silu(gate)
// Source: Gu and Dao, Mamba, arXiv 2312.00752, algorithm 2.
struct ChannelScanParams {
  const float* x;  // [num_tokens, x_stride], the channels first
  int64_t x_stride;
  const float* steps;  // [num_tokens, steps_stride], one per channel
  int64_t steps_stride;
  const float* parts;  // [num_tokens, parts_stride]: B and C [state_size]
  int64_t parts_stride;
  const float* gate;  // [num_tokens, gate_stride], one per channel
  int64_t gate_stride;
  int64_t num_channels;  // a multiple of 16
  int64_t state_size;
  const float* a;   // [num_channels / 16, state_size, 16], not positive
  const float* d;   // [num_channels]
  StateView state;  // the shape of a
  float* out;       // [num_tokens, out_stride], zero past the channels
  int64_t out_stride;
};

// The gated delta rule. Each token decays a head's state and corrects the value stored under its
// key:
//   state  = e^(a * softplus(decay_step + bias)) * state
//   state += k (rate * (v - k . state)), where rate = sigmoid(rate_step)
//   out    = q . state
// k and q are normalised, and q is divided by sqrt(key_dim). Source: Yang, Kautz and Hatamizadeh,
// Gated Delta Networks, arXiv 2412.06464, section 3.
struct DeltaRuleParams {
  const float* in;  // [num_tokens, in_stride]: q, k [key heads, key_dim], v [heads, head_dim]
  int64_t in_stride;
  const float* steps;  // [num_tokens, steps_stride]: all heads' rate steps, then decay steps
  int64_t steps_stride;
  int64_t num_heads;
  int64_t head_dim;       // a multiple of 16
  int64_t num_key_heads;  // divides num_heads
  int64_t key_dim;        // up to kMaxKeyDim
  bool is_tiled;          // head h uses key head h % num_key_heads; else neighbours share one
  const float* a;         // [num_heads], negative
  const float* dt_bias;   // [num_heads]
  StateView state;        // [num_heads, head_dim / 16, key_dim, 16]
  float* out;             // [num_tokens, out_stride], zero past the heads
  int64_t out_stride;
};

// Gated rows, normed in groups of columns: norm(rows * f(s * gate)), or norm(rows) * f(s * gate).
struct GatedNormParams {
  const float* rows;  // [num_tokens, stride]
  int64_t stride;
  const float* gate;  // [num_tokens, gate_stride]
  int64_t gate_stride;
  int64_t width;        // columns
  int64_t group_width;  // divides width
  const float* weight;  // [width], or null: no norm
  float eps;
  bool is_gate_first;
  bool is_sigmoid;   // f is the sigmoid, else silu
  float gate_scale;  // s
  float* out;        // [num_tokens, out_stride], zero past the columns
  int64_t out_stride;
  int64_t gate_width = 1;  // columns that share a gate: 1, or a multiple of 16
};

}  // namespace tgi::cpu::step
