// Routed experts of each kernel set. Only step_variants.cpp includes this, inside its namespace.
#pragma once

constexpr int64_t kExperts = 2, kInnerColumns = 32, kDownRows = 256;

// A router's choices for all tokens, which own the lists.
struct Routing {
  Routing(int64_t num_experts, int64_t top_k)
      : ids(kTokens * top_k, -1),
        tokens(ids),
        weights(kTokens * top_k, NAN),
        token_weights(weights),
        experts(num_experts) {
    view = {num_experts,          top_k,          ids.data(), weights.data(), tokens.data(),
            token_weights.data(), experts.data(), &num_used};
  }
  Routing(const Routing&) = delete;
  Routing& operator=(const Routing&) = delete;

  std::vector<int32_t> ids, tokens;
  std::vector<float> weights, token_weights;
  std::vector<ExpertTokens> experts;
  int64_t num_used = 0;
  ExpertRouting view;
};

// Returns the down matrices of all experts, packed: Q8_0, each row a single block.
const Bytes& down_panels() {
  static const Bytes packed = [] {
    std::mt19937 random(5);
    const Bytes rows = random_rows(Format::kQ8_0, random);
    std::vector<const uint8_t*> pointers;
    for (int64_t r = 0; r < kExperts * kDownRows; ++r) {
      pointers.push_back(rows.data() + r * file_row_bytes(Format::kQ8_0, kInnerColumns));
    }
    const int64_t panels = kExperts * kDownRows / kPanelRows;
    Bytes found(static_cast<size_t>(panels * panel_bytes(Format::kQ8_0, kInnerColumns)));
    pack_panels(Format::kQ8_0, kInnerColumns, pointers.data(), 0, panels, found.data());
    return found;
  }();
  return packed;
}

StepHeader step_of_tokens(int64_t num_tokens) {
  StepHeader step = {};
  step.num_tokens = step.num_rows = num_tokens;
  return step;
}

// Returns the experts that routers of every kind choose, of a number that fills no whole vector,
// and their weights.
Bytes routes_of(const Kernels& kernels, const std::vector<float>& x) {
  constexpr int64_t kRouted = 20, kTopK = 3;
  Bytes found;
  for (const RouteKind kind : {RouteKind::kSoftmax, RouteKind::kSigmoid, RouteKind::kSparseMixer}) {
    for (const bool has_groups : {false, true}) {
      Routing routing(kRouted, kTopK);
      RouteParams params = {};
      params.logits = x.data();
      params.stride = kColumns;
      params.kind = kind;
      params.correction = has_groups ? x.data() + 100 : nullptr;
      params.num_groups = has_groups ? 5 : 1;
      params.top_groups = has_groups ? 2 : 1;
      params.sums_top_two = params.is_renormalised = has_groups;
      params.eps = 1e-20f;
      params.scale = 1.5f;
      params.jitter = 0.1f;
      params.expert_scales = has_groups ? x.data() + 300 : nullptr;
      params.out = routing.view;
      kernels.route(params, step_of_tokens(kTokens), 0, 1);
      append(found, routing.weights);
      append(found, routing.token_weights);
      for (const std::vector<int32_t>& each : {routing.ids, routing.tokens}) {
        for (const int32_t id : each) found.push_back(static_cast<uint8_t>(id));
      }
    }
  }
  return found;
}

// Returns sums of the outputs of two experts whose gates and ups are in `weight`: as one matrix,
// added to what is there, and as two, as rows, and without ups. The buffers hold one expert of all
// tokens, so that a step of all takes two passes.
Bytes experts_of(const Kernels& kernels, const PackedMatrix& weight, Precision precision,
                 const std::vector<float>& x) {
  const int64_t down_bytes = kDownRows / kPanelRows * panel_bytes(Format::kQ8_0, kInnerColumns);
  PackedMatrix whole[kExperts], gates[kExperts], ups[kExperts], downs[kExperts];
  for (int64_t e = 0; e < kExperts; ++e) {
    whole[e] = {weight.panel(2 * e), weight.format, 2 * kInnerColumns, kColumns};
    gates[e] = {weight.panel(2 * e), weight.format, kInnerColumns, kColumns};
    ups[e] = {weight.panel(2 * e + 2), weight.format, kInnerColumns, kColumns};
    downs[e] = {down_panels().data() + e * down_bytes, Format::kQ8_0, kDownRows, kInnerColumns};
  }
  const float* biases[kExperts] = {x.data() + 5, x.data() + 70};
  std::vector<float> scratch(scratch_of(kernels, weight, precision, 2) +
                             scratch_of(kernels, downs[0], Precision::kInt8, 1));
  std::vector<float> kept(kTokens * kInnerColumns);
  const LinearParams linear = {weight, nullptr, {}, 0, scratch.data(), 0};
  Bytes found;
  for (const int64_t tokens : {int64_t{1}, int64_t{6}, kTokens}) {
    for (int form = 0; form < 3; ++form) {
      const bool is_whole = form == 1, is_gated = form < 2;
      Input input(kernels, precision, kColumns, tokens);
      Input gathered(kernels, precision, kColumns, kTokens);
      Input inner(kernels, Precision::kInt8, kInnerColumns, kTokens);
      Routing routing(kExperts, kExperts);
      std::vector<float> sums(kTokens * kDownRows, is_whole ? 3.0f : NAN);
      const StepHeader step = step_of_tokens(tokens);
      RouteParams route = {};
      route.logits = x.data();
      route.stride = kColumns;
      route.num_groups = route.top_groups = 1;
      route.scale = 1.0f;
      route.out = routing.view;
      kernels.route(route, step, 0, 1);
      kernels.pack({x.data(), kColumns, kColumns, input.view}, step, 0, 1);
      ExpertsParams params = {};
      params.routing = routing.view;
      params.in = input.view;
      params.is_gated = is_gated;
      params.gate_up[0] = {linear, {is_whole ? whole : gates, biases}};
      params.gate_up[1] = {linear, {ups, nullptr}};
      params.num_parts = is_whole || !is_gated ? 1 : 2;
      params.down = {linear, {downs, biases}};
      params.function = {is_gated ? tgi::MlpActivation::kSilu : tgi::MlpActivation::kReluSquared};
      if (is_whole) params.clamped = {1.5f, 1.7f, 1.0f};
      params.gathered = gathered.view;
      params.inner = inner.view;
      params.num_tiles = (kTokens + kernels.tile_tokens - 1) / kernels.tile_tokens;
      params.gates = kept.data();
      params.factor = 0.75f;
      params.adds = is_whole;
      params.out = sums.data();
      kernels.experts(params, step, 0, 1);
      append(found, sums);
    }
  }
  return found;
}
