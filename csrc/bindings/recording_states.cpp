// Recording of recurrent layers: checks their operands once.
#include <initializer_list>
#include <utility>

#include "bindings/recording.h"
#include "bindings/state_params.h"
#include "cpu/step/kernel_sets.h"

namespace tgi {

namespace {

// Returns a pointer to columns of rows.
const float* columns_of(const RowsPtr& rows, int64_t first, int64_t count, const char* name) {
  check(first >= 0 && first <= rows->num_columns && count <= rows->num_columns - first, "columns [",
        first, ", ", first + count, ") must be in `", name, "`, which has ", rows->num_columns);
  return rows->data() + first;
}

void check_sizes(std::initializer_list<std::pair<int64_t, const char*>> sizes) {
  for (const auto& [size, name] : sizes) {
    check(size > 0 && size <= kMaxStateSize, "`", name, "` must be in [1, ", kMaxStateSize,
          "], got ", size);
  }
}

}  // namespace

void Recording::use_states(const StatesPtr& states) {
  check_before_end("a recurrent layer");
  if (states_ == nullptr) states_ = states;
  check(states == states_, "all layers of a program must have one pool of states");
}

void Recording::short_conv(const RowsPtr& rows, const ShortConv& conv, const StatesPtr& states,
                           int64_t layer, const RowsPtr& out) {
  use_states(states);
  step::ShortConvParams params = params_of(conv, *states, layer);
  const int64_t width = params.padded_channels();
  check_rows_buffer(rows, rows->num_columns, "rows");
  check_rows_buffer(out, width, "out");
  check(rows != out, "`out` must be another buffer");
  const auto part = [&](int64_t first_column) {
    return columns_of(rows, first_column, params.num_channels, "rows");
  };
  params.in = part(conv.first_column);
  if (conv.in_gate) params.in_gate = part(*conv.in_gate);
  if (conv.out_gate) params.out_gate = part(*conv.out_gate);
  params.stride = rows->num_columns;
  params.out = out->data();
  keep(conv.weight);
  if (conv.bias) keep(*conv.bias);
  keep(rows->memory);
  keep(out->memory);
  forward_.add(step::kernels().short_conv, params);
}

void Recording::selective_scan(const RowsPtr& in, const RowsPtr& steps, const SelectiveScan& scan,
                               const StatesPtr& states, int64_t layer, const RowsPtr& out) {
  use_states(states);
  check_sizes({{scan.num_heads, "num_heads"},
               {scan.head_dim, "head_dim"},
               {scan.num_groups, "num_groups"},
               {scan.state_size, "state_size"}});
  check(scan.head_dim % kVectorFloats == 0, "`head_dim` must be a multiple of ", kVectorFloats,
        ", got ", scan.head_dim);
  check(scan.num_heads % scan.num_groups == 0, "`num_groups` must divide the ", scan.num_heads,
        " heads, got ", scan.num_groups);
  const int64_t width = scan.num_heads * scan.head_dim;
  check(states->shape(layer).num_floats == width * scan.state_size, "the layer's state must have ",
        width * scan.state_size, " floats, got ", states->shape(layer).num_floats);
  check_shape(scan.a, "a", {scan.num_heads});
  check_shape(scan.d, "d", {scan.num_heads});
  check_shape(scan.dt_bias, "dt_bias", {scan.num_heads});
  for (const RowsPtr& each : {in, steps}) check_rows_buffer(each, each->num_columns, "rows");
  check_rows_buffer(out, step::padded_columns(width), "out");
  check(out != in && out != steps, "`out` must be another buffer");
  step::SelectiveScanParams params = {};
  params.in = columns_of(in, 0, width + 2 * scan.num_groups * scan.state_size, "source");
  params.in_stride = in->num_columns;
  params.dt = columns_of(steps, scan.dt_column, scan.num_heads, "steps");
  params.dt_stride = steps->num_columns;
  params.num_heads = scan.num_heads;
  params.head_dim = scan.head_dim;
  params.num_groups = scan.num_groups;
  params.state_size = scan.state_size;
  params.a = keep(scan.a);
  params.d = keep(scan.d);
  params.dt_bias = keep(scan.dt_bias);
  params.dt_scale = static_cast<float>(scan.dt_scale);
  params.dt_low = static_cast<float>(scan.dt_low);
  params.dt_high = static_cast<float>(scan.dt_high);
  params.state = states->floats(layer);
  params.out = out->data();
  params.out_stride = out->num_columns;
  for (const RowsPtr& each : {in, steps, out}) keep(each->memory);
  forward_.add(step::kernels().selective_scan, params);
}

void Recording::channel_scan(const RowsPtr& x, const RowsPtr& steps, const RowsPtr& parts,
                             const RowsPtr& gate, const ChannelScan& scan, const StatesPtr& states,
                             int64_t layer, const RowsPtr& out) {
  use_states(states);
  const int64_t channels = scan.num_channels, size = scan.state_size;
  check_sizes({{channels, "num_channels"}, {size, "state_size"}});
  check(channels % kVectorFloats == 0, "`num_channels` must be a multiple of ", kVectorFloats,
        ", got ", channels);
  check(states->shape(layer).num_floats == channels * size, "the layer's state must have ",
        channels * size, " floats, got ", states->shape(layer).num_floats);
  check_shape(scan.a, "a", {channels / kVectorFloats, size, kVectorFloats});
  check_shape(scan.d, "d", {channels});
  for (const RowsPtr& each : {x, steps, parts, gate}) {
    check_rows_buffer(each, each->num_columns, "rows");
    check(each != out, "`out` must be another buffer");
  }
  check_rows_buffer(out, step::padded_columns(channels), "out");
  step::ChannelScanParams params = {};
  params.x = columns_of(x, 0, channels, "source");
  params.x_stride = x->num_columns;
  params.steps = columns_of(steps, 0, channels, "steps");
  params.steps_stride = steps->num_columns;
  params.parts = columns_of(parts, scan.parts_column, 2 * size, "parts");
  params.parts_stride = parts->num_columns;
  params.gate = columns_of(gate, scan.gate_column, channels, "gate");
  params.gate_stride = gate->num_columns;
  params.num_channels = channels;
  params.state_size = size;
  params.a = keep(scan.a);
  params.d = keep(scan.d);
  params.state = states->floats(layer);
  params.out = out->data();
  params.out_stride = out->num_columns;
  for (const RowsPtr& each : {x, steps, parts, gate, out}) keep(each->memory);
  forward_.add(step::kernels().channel_scan, params);
}

void Recording::delta_rule(const RowsPtr& in, const RowsPtr& steps, const DeltaRule& rule,
                           const StatesPtr& states, int64_t layer, const RowsPtr& out) {
  use_states(states);
  step::DeltaRuleParams params = params_of(rule, *states, layer);
  for (const RowsPtr& each : {in, steps}) check_rows_buffer(each, each->num_columns, "rows");
  check_rows_buffer(out, step::padded_columns(width_of(rule)), "out");
  check(out != in && out != steps, "`out` must be another buffer");
  params.in = columns_of(in, 0, columns_of(rule), "source");
  params.in_stride = in->num_columns;
  params.steps = columns_of(steps, 0, 2 * rule.num_heads, "steps");
  params.steps_stride = steps->num_columns;
  params.out = out->data();
  params.out_stride = out->num_columns;
  keep(rule.a);
  keep(rule.dt_bias);
  for (const RowsPtr& each : {in, steps, out}) keep(each->memory);
  forward_.add(step::kernels().delta_rule, params);
}

void Recording::gated_norm(const RowsPtr& rows, const RowsPtr& gate, const GatedNorm& norm,
                           const RowsPtr& out) {
  check_size(norm.width, "width");
  check(norm.group_width > 0 && norm.width % norm.group_width == 0,
        "`group_width` must divide the ", norm.width, " columns, got ", norm.group_width);
  for (const RowsPtr& each : {rows, gate}) check_rows_buffer(each, each->num_columns, "rows");
  check_rows_buffer(out, step::padded_columns(norm.width), "out");
  check(out != rows && out != gate, "`out` must be another buffer");
  if (norm.weight) check_shape(*norm.weight, "weight", {norm.width});
  step::GatedNormParams params = {};
  params.rows = columns_of(rows, 0, norm.width, "rows");
  params.stride = rows->num_columns;
  const int64_t shared = norm.gate_width;
  check(shared == 1 || (shared > 0 && shared % 16 == 0 && norm.width % shared == 0),
        "`gate_width` must be 1, or a multiple of 16 that divides the ", norm.width,
        " columns, got ", shared);
  params.gate_width = shared;
  params.gate = columns_of(gate, 0, norm.width / shared, "gate");
  params.gate_stride = gate->num_columns;
  params.width = norm.width;
  params.group_width = norm.group_width;
  params.weight = norm.weight ? keep(*norm.weight) : nullptr;
  params.eps = static_cast<float>(norm.eps);
  params.is_gate_first = norm.is_gate_first;
  params.is_sigmoid = norm.is_sigmoid;
  params.gate_scale = static_cast<float>(norm.gate_scale);
  params.out = out->data();
  params.out_stride = out->num_columns;
  for (const RowsPtr& each : {rows, gate, out}) keep(each->memory);
  forward_.add(step::kernels().gated_norm, params);
}

}  // namespace tgi
