// tgi_asgi._C.Program: the Python binding.
#include <pybind11/stl.h>

#include <cstring>
#include <utility>

#include "bindings/program.h"

namespace tgi {

namespace {

using MaybeFloats = std::optional<Floats>;

Floats rows_of_tiles(const ActivationBuffer& a) {
  check(a.view.precision == step::Precision::kFloat32, "only float32 activations can be read");
  Floats out({a.num_rows, a.view.num_columns});
  for (int64_t row = 0; row < a.num_rows; ++row) {
    for (int64_t block = 0; block < a.view.num_columns / step::kBlockColumns; ++block) {
      const uint8_t* const from =
          a.view.block(row, block, a.tile_tokens) + row % a.tile_tokens * 128;
      std::memcpy(out.mutable_data(row, block * step::kBlockColumns), from, 128);
    }
  }
  return out;
}

void bind_buffers(py::module_& module) {
  py::class_<RowsBuffer, RowsPtr>(module, "Rows", "Rows of float32, one per token.")
      .def(
          "array",
          [](const py::object& self) {
            const auto& rows = self.cast<const RowsBuffer&>();
            return Floats({rows.num_rows, rows.num_columns}, rows.data(), self);
          },
          "Return the rows without copying, including padding columns.");
  py::class_<ActivationBuffer, ActivationPtr>(module, "Activation", "The input of products.")
      .def("array", &rows_of_tiles,
           "Return a copy of a float32 activation's rows (for tests and benchmarks).");
  py::class_<QueryBuffer, QueryPtr>(module, "Query", "Queries, in the cache's layout.")
      .def(
          "array",
          [](const py::object& self) {
            const auto& query = self.cast<const QueryBuffer&>();
            return Array<uint8_t>({query.num_rows, query.row_bytes}, query.memory.get(), self);
          },
          "Return the bytes of each token's queries (for tests and benchmarks).");
}

// Structs have their fields in the order of the arguments.
void bind_operands(py::module_& module) {
  using MaybeInt = std::optional<int64_t>;
  py::class_<Product>(module, "Product", "A product's operands.")
      .def(py::init<const Matrix&, const ActivationPtr&, const MaybeFloats&, MaybeInt>(),
           py::kw_only(), py::arg("weight"), py::arg("source").none(false),
           py::arg("bias").noconvert() = py::none(), py::arg("adapter") = py::none(),
           py::keep_alive<1, 2>());
  py::class_<Norm>(module, "Norm", "A norm of rows or heads; a bias makes it a LayerNorm.")
      .def(py::init<Floats, MaybeFloats, int64_t, double>(), py::kw_only(),
           py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("width"),
           py::arg("eps"));
  py::class_<HeadNorms>(module, "HeadNorms", "The norms of queries and keys.")
      .def(py::init<const Norm&, const Norm&, bool, bool, bool>(), py::kw_only(), py::arg("query"),
           py::arg("key"), py::arg("is_whole"), py::arg("is_last"), py::arg("has_values"));
  py::class_<Heads>(module, "Heads", "How heads are normalised, rotated and stored.")
      .def(py::init<PoolPtr, int64_t, int64_t, int64_t, std::optional<double>, MaybeFloats,
                    MaybeFloats, std::optional<HeadNorms>, double, MaybeFloats>(),
           py::kw_only(), py::arg("pool").none(false), py::arg("layer"), py::arg("num_heads"),
           py::arg("true_dim"), py::arg("scale"), py::arg("cosines").noconvert() = py::none(),
           py::arg("sines").noconvert() = py::none(), py::arg("norms") = py::none(),
           py::arg("clip") = 0.0, py::arg("query_scales").noconvert() = py::none());
  py::class_<LatentHeads>(module, "LatentHeads", "The parameters of latent attention.")
      .def(py::init<PoolPtr, int64_t, int64_t, double, Floats, double, Floats, Floats, int64_t>(),
           py::kw_only(), py::arg("pool").none(false), py::arg("layer"), py::arg("num_heads"),
           py::arg("scale"), py::arg("norm").noconvert(), py::arg("eps"),
           py::arg("cosines").noconvert(), py::arg("sines").noconvert(), py::arg("rotary_column"));
  py::class_<ShortConv>(module, "ShortConv", "A short convolution over columns of rows.")
      .def(py::init<Floats, MaybeFloats, int64_t, MaybeInt, MaybeInt, bool>(), py::kw_only(),
           py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("first_column"),
           py::arg("in_gate"), py::arg("out_gate"), py::arg("has_silu"));
  py::class_<SelectiveScan>(module, "SelectiveScan", "State spaces of heads.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Floats, Floats, Floats, int64_t, double,
                    double, double>(),
           py::kw_only(), py::arg("num_heads"), py::arg("head_dim"), py::arg("num_groups"),
           py::arg("state_size"), py::arg("a").noconvert(), py::arg("d").noconvert(),
           py::arg("dt_bias").noconvert(), py::arg("dt_column"), py::arg("dt_scale"),
           py::arg("dt_low"), py::arg("dt_high"));
  py::class_<ChannelScan>(module, "ChannelScan", "Channels with a state each.")
      .def(py::init<int64_t, int64_t, Floats, Floats, int64_t, int64_t>(), py::kw_only(),
           py::arg("num_channels"), py::arg("state_size"), py::arg("a").noconvert(),
           py::arg("d").noconvert(), py::arg("parts_column"), py::arg("gate_column"));
  py::class_<DeltaRule>(module, "DeltaRule", "Heads of the gated delta rule.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, bool, Floats, Floats>(), py::kw_only(),
           py::arg("num_heads"), py::arg("head_dim"), py::arg("num_key_heads"), py::arg("key_dim"),
           py::arg("is_tiled"), py::arg("a").noconvert(), py::arg("dt_bias").noconvert());
  py::class_<GatedNorm>(module, "GatedNorm", "A norm of groups of columns, and a gate.")
      .def(py::init<int64_t, int64_t, MaybeFloats, double, bool, bool, double, int64_t>(),
           py::kw_only(), py::arg("width"), py::arg("group_width"), py::arg("weight").noconvert(),
           py::arg("eps"), py::arg("is_gate_first"), py::arg("is_sigmoid"), py::arg("gate_scale"),
           py::arg("gate_width") = 1);
}

}  // namespace

// Required operands are bound with none(false), because None would become a null pointer.
void bind_program(py::module_& module) {
  bind_buffers(module);
  bind_operands(module);
  py::class_<Program, std::shared_ptr<Program>>(module, "Program",
                                                "See csrc/bindings/recording.h and program.h.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::kw_only(), py::arg("max_tokens"),
           py::arg("max_sequences"), py::arg("max_rows"), py::arg("max_context"))
      .def(
          "set_adapters",
          [](Program& program, std::shared_ptr<AdapterLayout> layout) {
            program.set_adapters(std::move(layout));
          },
          py::arg("layout").none(false))
      .def("set_shards", &Program::set_shards, py::arg("shards").none(false),
           py::arg("first_vocab_id"))
      .def("partial_sum", &Program::partial_sum)
      .def("rows", &Program::rows, py::arg("columns"), py::kw_only(), py::arg("for_logits") = false)
      .def("activation", &Program::activation, py::arg("columns"), py::arg("precision"),
           py::kw_only(), py::arg("for_logits") = false, py::arg("min_tiles") = 0)
      .def("routing", &Program::routing, py::arg("num_experts"), py::arg("top_k"))
      .def("query", &Program::query, py::arg("pool"), py::arg("layer"), py::arg("num_heads"))
      .def("embed", &Program::embed, py::kw_only(), py::arg("table"), py::arg("factor"),
           py::arg("positions").noconvert(), py::arg("out").none(false))
      .def("embed_add", &Program::embed_add, py::kw_only(), py::arg("table"), py::arg("factor"),
           py::arg("rows").none(false))
      .def("image_rows", &Program::image_rows, py::kw_only(), py::arg("x").none(false),
           py::arg("level"), py::arg("adds"))
      .def("norm", &Program::norm, py::kw_only(), py::arg("x").none(false), py::arg("norm"),
           py::arg("for_logits"), py::arg("is_private"), py::arg("out").none(false))
      .def("norm_add", &Program::norm_add, py::kw_only(), py::arg("rows").none(false),
           py::arg("norm"), py::arg("factor"), py::arg("scale"), py::arg("x").none(false))
      .def("norm_in_place", &Program::norm_in_place, py::kw_only(), py::arg("norm"),
           py::arg("x").none(false), py::arg("first_column") = py::none())
      .def("pack", &Program::pack, py::kw_only(), py::arg("rows").none(false),
           py::arg("out").none(false), py::arg("columns") = py::none())
      .def("reorder", &Program::reorder, py::kw_only(), py::arg("source").none(false),
           py::arg("order").noconvert(), py::arg("out").none(false))
      .def("linear", &Program::linear, py::kw_only(), py::arg("product"),
           py::arg("out").none(false), py::arg("first_column") = 0)
      .def("linear_add", &Program::linear_add, py::kw_only(), py::arg("product"), py::arg("factor"),
           py::arg("x").none(false))
      .def("sum_shards", &Program::sum_shards, py::kw_only(), py::arg("partial_sum").none(false),
           py::arg("factor"), py::arg("adds"), py::arg("x").none(false))
      .def("qkv", &Program::qkv, py::kw_only(), py::arg("products"), py::arg("heads"),
           py::arg("has_keys"), py::arg("out").none(false))
      .def("head_rows", &Program::head_rows, py::kw_only(), py::arg("rows").none(false),
           py::arg("heads"), py::arg("has_keys"), py::arg("out").none(false))
      .def("heads_linear", &Program::heads_linear, py::kw_only(), py::arg("product"),
           py::arg("num_heads"), py::arg("out").none(false))
      .def("latent_qkv", &Program::latent_qkv, py::kw_only(), py::arg("absorbed").none(false),
           py::arg("rotary").none(false), py::arg("latents").none(false), py::arg("heads"),
           py::arg("out").none(false))
      .def("attention", &Program::attention, py::kw_only(), py::arg("q").none(false),
           py::arg("pool").none(false), py::arg("layer"), py::arg("true_dim"),
           py::arg("spec").none(false), py::arg("out") = ActivationPtr(),
           py::arg("rows") = RowsPtr())
      .def("up", &Program::up, py::kw_only(), py::arg("product"), py::arg("activation"),
           py::arg("alphas"), py::arg("out").none(false))
      .def("gate_up", &Program::gate_up, py::kw_only(), py::arg("product"), py::arg("activation"),
           py::arg("out").none(false))
      .def("act_mul", &Program::act_mul, py::kw_only(), py::arg("gate").none(false),
           py::arg("up").none(false), py::arg("first_column"), py::arg("activation"),
           py::arg("out").none(false))
      .def("route", &Program::route, py::kw_only(), py::arg("logits").none(false),
           py::arg("spec").none(false), py::arg("out").none(false))
      .def("experts", &Program::experts, py::kw_only(), py::arg("source").none(false),
           py::arg("routing").none(false), py::arg("mlps").none(false),
           py::arg("gathered").none(false), py::arg("inner").none(false), py::arg("factor"),
           py::arg("adds"), py::arg("out").none(false))
      .def("gated_add", &Program::gated_add, py::kw_only(), py::arg("rows").none(false),
           py::arg("gate").none(false), py::arg("factor"), py::arg("x").none(false))
      .def("short_conv", &Program::short_conv, py::kw_only(), py::arg("rows").none(false),
           py::arg("conv"), py::arg("states").none(false), py::arg("layer"),
           py::arg("out").none(false))
      .def("selective_scan", &Program::selective_scan, py::kw_only(), py::arg("source").none(false),
           py::arg("steps").none(false), py::arg("scan"), py::arg("states").none(false),
           py::arg("layer"), py::arg("out").none(false))
      .def("channel_scan", &Program::channel_scan, py::kw_only(), py::arg("source").none(false),
           py::arg("steps").none(false), py::arg("parts").none(false), py::arg("gate").none(false),
           py::arg("scan"), py::arg("states").none(false), py::arg("layer"),
           py::arg("out").none(false))
      .def("delta_rule", &Program::delta_rule, py::kw_only(), py::arg("source").none(false),
           py::arg("steps").none(false), py::arg("rule"), py::arg("states").none(false),
           py::arg("layer"), py::arg("out").none(false))
      .def("gated_norm", &Program::gated_norm, py::kw_only(), py::arg("rows").none(false),
           py::arg("gate").none(false), py::arg("norm"), py::arg("out").none(false))
      .def("logits", &Program::logits, py::kw_only(), py::arg("product"), py::arg("vocab_size"),
           py::arg("scale"), py::arg("cap"))
      .def("end_cache_writes", &Program::end_cache_writes, py::kw_only(), py::arg("can_gather"),
           py::arg("rows"), py::arg("query"))
      .def("run", &Program::run, py::arg("batch"), py::arg("rows"))
      .def("run_and_sample", &Program::run_and_sample, py::arg("batch"), py::arg("rows"),
           py::arg("slots"), py::arg("state"), py::arg("mask").noconvert() = py::none(),
           py::arg("drafts") = std::vector<int32_t>())
      .def("profile", &Program::profile, py::arg("batch"), py::arg("rows"))
      .def("run_head", &Program::run_head, py::arg("rows"))
      .def_property_readonly("num_steps", &Program::num_steps)
      .def("roll_back_to", &Program::roll_back_to, py::arg("num_steps"))
      .def("discard_states", &Program::discard_states, py::arg("slot"), py::arg("num_tokens"))
      .def("set_rotary_shift", &Program::set_rotary_shift, py::arg("slot"), py::arg("shift"))
      .def("copy_blocks", &Program::copy_blocks, py::arg("pairs"))
      .def("follow", &Program::follow, py::call_guard<py::gil_scoped_release>())
      .def(
          "keep_adapter",
          [](Program& program, std::shared_ptr<Adapter> adapter) {
            program.keep_adapter(std::move(adapter));
          },
          py::arg("adapter").none(false))
      .def("drop_adapter", &Program::drop_adapter, py::arg("number"))
      .def_property_readonly("num_operators", &Program::num_operators,
                             "Number of kernel calls in a step (for tests and benchmarks).");
}

}  // namespace tgi
