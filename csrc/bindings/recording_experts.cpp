// Recording of routed experts: checks their operands once.
#include <algorithm>

#include "bindings/recording.h"
#include "cpu/step/kernel_sets.h"

namespace tgi {

RoutingPtr Recording::routing(int64_t num_experts, int64_t top_k) const {
  return std::make_shared<RoutingBuffer>(RoutingBuffer::make(max_tokens_, num_experts, top_k));
}

void Recording::route(const RowsPtr& logits, const RoutePtr& spec, const RoutingPtr& out) {
  check_rows_buffer(logits, step::padded_columns(spec->num_experts()), "logits");
  check_num_rows(*out, "out");
  check(out->view.num_experts == spec->num_experts() && out->view.top_k == spec->top_k(),
        "`out` must be of this spec's ", spec->num_experts(), " experts, ", spec->top_k(),
        " a token");
  keep(logits->memory);
  keep(out->memory);
  others_.push_back(spec);
  step::RouteParams params = spec->params();
  params.logits = logits->data();
  params.stride = logits->num_columns;
  params.out = out->view;
  forward_.add(step::kernels().route, params);
}

void Recording::experts(const ActivationPtr& in, const RoutingPtr& routing, const MlpsPtr& mlps,
                        const ActivationPtr& gathered, const ActivationPtr& inner, double factor,
                        bool adds, const RowsPtr& out) {
  check_num_rows(*in, "source");
  check_num_rows(*routing, "routing");
  check_num_rows(*gathered, "gathered");
  check_num_rows(*inner, "inner");
  check_rows_buffer(out, mlps->down->num_rows(), "out");
  check(routing->view.num_experts == mlps->down->num_experts(), "the routing is of ",
        routing->view.num_experts, " experts, the layer has ", mlps->down->num_experts());
  check(in != gathered && in != inner && gathered != inner, "the activations must be different");
  const step::Activation &from = in->view, &to = gathered->view;
  check(from.num_columns == mlps->gate_up.front()->num_columns(), "the input must have ",
        mlps->gate_up.front()->num_columns(), " columns, got ", from.num_columns);
  check(to.num_columns == from.num_columns && to.precision == from.precision &&
            to.is_by_kind() == from.is_by_kind(),
        "`gathered` must be of the input's kind");
  check(inner->view.num_columns == mlps->num_columns(), "`inner` must have ", mlps->num_columns(),
        " columns, got ", inner->view.num_columns);
  step::ExpertsParams params = {};
  params.routing = routing->view;
  params.in = from;
  params.is_private = in->is_private;
  params.gathered = to;
  params.inner = inner->view;
  params.num_tiles = std::min(gathered->num_tiles, inner->num_tiles);
  check(params.num_tiles >= tiles_of(max_tokens_), "`gathered` and `inner` must hold ",
        tiles_of(max_tokens_), " tiles, got ", params.num_tiles);
  params.factor = static_cast<float>(factor);
  params.adds = adds;
  params.out = out->data();
  const int64_t floats = set_experts(*mlps, params);
  params.gate_floats = params.num_parts == 2 ? max_tokens_ * step::kStripRows : 0;
  float* const scratch = scratch_of(num_members_ * (floats + params.gate_floats));
  set_scratch(params, scratch, floats);
  params.gates = scratch + num_members_ * floats;
  for (const ActivationPtr& each : {in, gathered, inner}) keep(*each);
  gathered->is_private = inner->is_private = false;
  keep(routing->memory);
  keep(out->memory);
  others_.push_back(mlps);
  forward_.add(step::kernels().experts, params, sync_after(out));
}

void Recording::gated_add(const RowsPtr& rows, const RowsPtr& gate, double factor,
                          const RowsPtr& x) {
  const int64_t columns = x->num_columns;
  check_rows_buffer(x, columns, "x");
  check_rows_buffer(rows, columns, "rows");
  check_rows_buffer(gate, gate->num_columns, "gate");
  for (const RowsPtr& each : {rows, gate, x}) keep(each->memory);
  const step::GatedAddParams params = {
      .rows = rows->data(),
      .gate = gate->data(),
      .gate_stride = gate->num_columns,
      .num_columns = columns,
      .factor = static_cast<float>(factor),
      .x = x->data(),
  };
  forward_.add(step::kernels().gated_add, params);
}

}  // namespace tgi
