// Operators of each kernel set that read and write states of sequences. Only step_variants.cpp
// includes this, inside its namespace.
#pragma once

// Returns a step of two sequences; the second resumes from its state, which is copied first.
StepHeader step_of_states() {
  static const StateSpan spans[] = {{0, 17, -1, 0}, {17, 17, 3, 1}, {17, kTokens, 1, 2}};
  StepHeader step = {};
  step.num_tokens = kTokens;
  step.state_spans = spans;
  step.num_state_spans = 3;
  return step;
}

// Returns the results of a short convolution for these sequences, and the states that it leaves.
Bytes convolution_of(const Kernels& kernels, const std::vector<float>& x, bool is_gated) {
  constexpr int64_t kChannels = 77, kPadded = 96, kTaps = 4, kPlaces = 4;
  const StepHeader step = step_of_states();
  std::vector<float> states(kPlaces * (kTaps - 1) * kPadded), out(kTokens * kPadded, NAN);
  std::copy_n(x.begin(), states.size(), states.begin());
  ShortConvParams params = {};
  params.in = x.data() + 9;
  params.in_gate = is_gated ? x.data() + 2 : nullptr;
  params.out_gate = is_gated ? x.data() + 101 : nullptr;
  params.stride = kColumns;
  params.num_channels = kChannels;
  params.num_taps = kTaps;
  params.weight = x.data() + 512;
  params.bias = is_gated ? nullptr : x.data() + 64;
  params.has_silu = !is_gated;
  params.state = {reinterpret_cast<uint8_t*>(states.data()),
                  (kTaps - 1) * kPadded * static_cast<int64_t>(sizeof(float))};
  params.out = out.data();
  for (int member = 0; member < 3; ++member) kernels.short_conv(params, step, member, 3);
  return joined({&out, &states});
}

// Returns the results of selective-scan heads for the same sequences, and of a gated norm after
// them.
Bytes scan_of(const Kernels& kernels, const std::vector<float>& x, bool is_gate_first) {
  constexpr int64_t kHeads = 2, kDim = 48, kSize = 20, kWidth = kHeads * kDim, kPlaces = 4;
  const StepHeader step = step_of_states();
  std::vector<float> states(kPlaces * kWidth * kSize), out(kTokens * kWidth, NAN), normed(out);
  std::copy_n(x.begin(), states.size(), states.begin());
  const std::vector<float> a(kHeads, -0.7f), d(kHeads, 0.3f), dt_bias(kHeads, 0.1f);
  SelectiveScanParams params = {};
  params.in = x.data();
  params.dt = x.data() + 200;
  params.in_stride = params.dt_stride = kColumns;
  params.num_heads = kHeads;
  params.head_dim = kDim;
  params.num_groups = 1;
  params.state_size = kSize;
  params.a = a.data();
  params.d = d.data();
  params.dt_bias = dt_bias.data();
  params.dt_scale = 0.7f;
  params.dt_high = INFINITY;
  params.state = {reinterpret_cast<uint8_t*>(states.data()),
                  kWidth * kSize * static_cast<int64_t>(sizeof(float))};
  params.out = out.data();
  params.out_stride = kWidth;
  for (int member = 0; member < 3; ++member) kernels.selective_scan(params, step, member, 3);
  kernels.gated_norm(
      {out.data(), kWidth, x.data() + 7, kColumns, kWidth, kDim / 2, x.data() + 99, 1e-5f,
       is_gate_first, !is_gate_first, 1.3f, normed.data(), kWidth, is_gate_first ? 1 : 16},
      step, 0, 1);
  return joined({&out, &states, &normed});
}

// Returns the results of channels with states for the same sequences.
Bytes channels_of(const Kernels& kernels, const std::vector<float>& x) {
  constexpr int64_t kChannels = 112, kSize = 5, kPlaces = 4;
  const StepHeader step = step_of_states();
  std::vector<float> states(kPlaces * kChannels * kSize), out(kTokens * kChannels, NAN);
  std::vector<float> a(kChannels * kSize);
  for (size_t i = 0; i < states.size(); ++i) states[i] = x[i % x.size()];
  for (size_t i = 0; i < a.size(); ++i) a[i] = -std::fabs(x[i]) * 9;
  ChannelScanParams params = {};
  params.x = x.data();
  params.steps = x.data() + 9;
  params.parts = x.data() + 21;
  params.gate = x.data() + 33;
  params.x_stride = params.steps_stride = params.parts_stride = params.gate_stride = kColumns;
  params.num_channels = kChannels;
  params.state_size = kSize;
  params.a = a.data();
  params.d = x.data() + 64;
  params.state = {reinterpret_cast<uint8_t*>(states.data()),
                  kChannels * kSize * static_cast<int64_t>(sizeof(float))};
  params.out = out.data();
  params.out_stride = kChannels;
  for (int member = 0; member < 3; ++member) kernels.channel_scan(params, step, member, 3);
  return joined({&out, &states});
}

// Returns the results of gated-delta-rule heads for the same sequences.
Bytes rule_of(const Kernels& kernels, const std::vector<float>& x, bool is_tiled) {
  constexpr int64_t kHeads = 4, kDim = 32, kSize = 20, kWidth = kHeads * kDim, kPlaces = 4;
  const StepHeader step = step_of_states();
  std::vector<float> states(kPlaces * kWidth * kSize), out(kTokens * kWidth, NAN);
  for (size_t i = 0; i < states.size(); ++i) states[i] = x[i % x.size()];
  const std::vector<float> a(kHeads, -0.7f), dt_bias(kHeads, 0.1f);
  DeltaRuleParams params = {};
  params.in = x.data();
  params.steps = x.data() + 100;
  params.in_stride = params.steps_stride = kColumns;
  params.num_heads = kHeads;
  params.head_dim = kDim;
  params.num_key_heads = 2;
  params.key_dim = kSize;
  params.is_tiled = is_tiled;
  params.a = a.data();
  params.dt_bias = dt_bias.data();
  params.state = {reinterpret_cast<uint8_t*>(states.data()),
                  kWidth * kSize * static_cast<int64_t>(sizeof(float))};
  params.out = out.data();
  params.out_stride = kWidth;
  for (int member = 0; member < 3; ++member) kernels.delta_rule(params, step, member, 3);
  return joined({&out, &states});
}
