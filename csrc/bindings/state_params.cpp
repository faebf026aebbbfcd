#include "bindings/state_params.h"

#include <initializer_list>
#include <utility>

namespace tgi {

namespace step = cpu::step;

step::ShortConvParams params_of(const ShortConv& conv, const StatePool& states, int64_t layer) {
  const StateShape& shape = states.shape(layer);
  step::ShortConvParams params = {};
  params.state = states.window(layer);
  params.num_channels = shape.num_channels;
  params.num_taps = shape.num_taps;
  check_shape(conv.weight, "weight", {shape.num_taps, params.padded_channels()});
  if (conv.bias) check_shape(*conv.bias, "bias", {params.padded_channels()});
  params.weight = conv.weight.data();
  params.bias = conv.bias ? conv.bias->data() : nullptr;
  params.has_silu = conv.has_silu;
  return params;
}

step::DeltaRuleParams params_of(const DeltaRule& rule, const StatePool& states, int64_t layer) {
  for (const auto& [size, name] :
       {std::pair{rule.num_heads, "num_heads"}, std::pair{rule.head_dim, "head_dim"},
        std::pair{rule.num_key_heads, "num_key_heads"}}) {
    check(size > 0 && size <= kMaxStateSize, "`", name, "` must be in [1, ", kMaxStateSize,
          "], got ", size);
  }
  check(rule.head_dim % kVectorFloats == 0, "`head_dim` must be a multiple of ", kVectorFloats,
        ", got ", rule.head_dim);
  check(rule.key_dim > 0 && rule.key_dim <= step::kMaxKeyDim, "`key_dim` must be in [1, ",
        step::kMaxKeyDim, "], got ", rule.key_dim);
  check(rule.num_heads % rule.num_key_heads == 0, "`num_key_heads` must divide the ",
        rule.num_heads, " heads, got ", rule.num_key_heads);
  const int64_t num_floats = width_of(rule) * rule.key_dim;
  check(states.shape(layer).num_floats == num_floats, "the layer's state must have ", num_floats,
        " floats, got ", states.shape(layer).num_floats);
  check_shape(rule.a, "a", {rule.num_heads});
  check_shape(rule.dt_bias, "dt_bias", {rule.num_heads});
  step::DeltaRuleParams params = {};
  params.num_heads = rule.num_heads;
  params.head_dim = rule.head_dim;
  params.num_key_heads = rule.num_key_heads;
  params.key_dim = rule.key_dim;
  params.is_tiled = rule.is_tiled;
  params.a = rule.a.data();
  params.dt_bias = rule.dt_bias.data();
  params.state = states.floats(layer);
  return params;
}

int64_t columns_of(const DeltaRule& rule) {
  return width_of(rule) + 2 * rule.num_key_heads * rule.key_dim;
}

int64_t width_of(const DeltaRule& rule) { return rule.num_heads * rule.head_dim; }

}  // namespace tgi
