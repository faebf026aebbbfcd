// The module tgi_asgi._cuda. It contains `Program` and `submit`, and importing it registers
// torch.ops.tgi_cuda. This file declares the operator schemas, one per CUDA launcher in
// csrc/cuda/kernels.h. Outputs are passed in and marked as mutated; such an operator returns
// nothing.
#include <torch/library.h>

#include "bindings/cuda/program.h"
#include "bindings/cuda/submit.h"
#include "cuda/dependent_launch.h"
#include "cuda/kernels.h"

TORCH_LIBRARY(tgi_cuda, m) {
  m.def("set_dependent_launches(bool is_on) -> ()", &tgi::cuda::set_dependent_launches);
  m.def(
      "begin_step(Tensor? records, Tensor from_slot, Tensor context_len, Tensor table_slots, "
      "Tensor table_firsts, Tensor table_starts, Tensor entries, int block_size, Tensor(a!) ids, "
      "Tensor(b!) kept, Tensor(c!) tables) -> ()");
  m.def("embed(Tensor ids, Tensor table, Tensor(a!) out) -> ()");
  m.def(
      "norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? rows, Tensor(a!) out) -> ()");
  m.def(
      "norm_add(Tensor rows, Tensor weight, Tensor? bias, float eps, float factor, Tensor(a!) x) "
      "-> ()");
  m.def("gate(Tensor gate_up, str activation, Tensor(a!) out) -> ()");
  m.def("activate(Tensor x, str activation, float above, float below, Tensor(a!) out) -> ()");
  m.def(
      "rope_kv_write(Tensor qkv, Tensor positions, Tensor slots, Tensor cos, Tensor sin, Tensor? "
      "q_norm, Tensor? k_norm, Tensor? q_bias, Tensor? k_bias, bool is_norm_last, float eps, float "
      "key_scale, float value_scale, Tensor(a!) q, Tensor(b!) kv) -> ()");
  m.def(
      "attention_plan(Tensor context_len, Tensor block_table, int block_size, int window, "
      "Tensor(a!) plan) -> ()");
  m.def(
      "attention_decode(Tensor q, Tensor kv, Tensor context_len, Tensor block_table, int window, "
      "float scale, float soft_cap, Tensor? sinks, Tensor? slopes, float key_scale, float "
      "value_scale, Tensor plan, Tensor(a!) workspace, Tensor(b!) out) -> ()");
  m.def(
      "attention_prefill(Tensor q, Tensor kv, Tensor query_start, Tensor context_len, Tensor "
      "block_table, int max_query_len, int window, float scale, float soft_cap, Tensor? sinks, "
      "Tensor? slopes, float key_scale, float value_scale, Tensor(a!) out) -> ()");
  m.def(
      "attention_gather(Tensor kv, Tensor block_table, int context_len, int num_rows, Tensor(a!) "
      "out) -> ()");
  m.def("attention_merge(Tensor[] parts, Tensor[] lses, float value_scale, Tensor(a!) out) -> ()");
  m.def("linear(Tensor a, Tensor weight, Tensor? bias, bool is_added, Tensor(a!) out) -> ()");
  m.def(
      "quant_linear(Tensor a, Tensor codes, Tensor scales, Tensor? offsets, Tensor? bias, int "
      "bits, int zero, bool is_added, Tensor(a!) out) -> ()");
  m.def(
      "dequantise(Tensor codes, Tensor scales, Tensor? offsets, int bits, int zero, Tensor(a!) "
      "out) -> ()");
  m.def("quantise(Tensor x, bool has_groups, Tensor(a!) codes, Tensor(b!) scales) -> ()");
  m.def(
      "multiply_codes(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scales, Tensor(a!) "
      "out) -> ()");
  m.def(
      "lora_down(Tensor x, Tensor adapters, Tensor places, Tensor pool, int product, int rank, "
      "Tensor(a!) inner) -> ()");
  m.def(
      "lora_up(Tensor inner, Tensor adapters, Tensor places, Tensor pool, int product, int rank, "
      "int columns, int first_end, int second_end, float factor, Tensor(a!) out) -> ()");
  m.def(
      "route(Tensor logits, Tensor slots, Tensor? correction, str kind, int num_groups, int "
      "top_groups, bool sums_top_two, bool is_renormalised, float eps, float scale, float jitter, "
      "Tensor(a!) ids, Tensor(b!) weights) -> ()");
  m.def(
      "experts_plan(Tensor ids, int num_experts, bool is_streamed, Tensor(a!) pairs, Tensor(b!) "
      "tiles) -> ()");
  m.def(
      "experts_gate_up(Tensor a, Tensor weight, Tensor? scales, Tensor? offsets, Tensor? bias, int "
      "bits, int zero, int num_experts, Tensor pairs, Tensor tiles, bool is_streamed, str "
      "activation, float limit, float slope, float offset, Tensor(a!) out) -> ()");
  m.def(
      "experts_down(Tensor a, Tensor weight, Tensor? scales, Tensor? offsets, Tensor? bias, int "
      "bits, int zero, int num_experts, Tensor pairs, Tensor tiles, bool is_streamed, Tensor(a!) "
      "out) -> ()");
  m.def(
      "experts_sum(Tensor rows, Tensor ids, Tensor weights, int num_experts, float factor, "
      "Tensor(a!) x) -> ()");
  m.def("residual_add(Tensor rows, float factor, Tensor(a!) x) -> ()");
  m.def("gated_add(Tensor rows, Tensor gate, float factor, Tensor(a!) x) -> ()");
  m.def("experts_max_tiles(int num_pairs, int num_experts, bool is_streamed) -> int",
        &tgi::cuda::experts_max_tiles);
  m.def(
      "sample(Tensor logits, Tensor slots, Tensor(a!) records, Tensor(b!) counts, "
      "Tensor biased_ids, Tensor biased_values, Tensor masked_ids, Tensor? mask, "
      "Tensor? mask_rows, Tensor(c!) scratch, Tensor(d!) workspace, Tensor(e!) token_ids, "
      "Tensor(f!) is_finite, Tensor(g!) logprobs, Tensor(h!) top_ids, Tensor(i!) top_logprobs, "
      "Tensor(j!) num_top) -> ()");
  m.def("sample_workspace_bytes(int num_rows) -> int", &tgi::cuda::sample_workspace_bytes);
  m.def(
      "draft_slots(Tensor(a!) records, Tensor(b!) counts, Tensor(c!) biased_ids, "
      "Tensor(d!) biased_values, Tensor(e!) masked_ids, Tensor slots, Tensor ahead, Tensor drafts) "
      "-> ()");
  m.def(
      "accept_drafts(Tensor(a!) records, Tensor(b!) counts, Tensor slots, Tensor ahead, "
      "Tensor drafts) -> ()");
  m.def(
      "token_logprobs(Tensor logits, Tensor token_ids, Tensor(a!) logprobs, Tensor(b!) top_ids, "
      "Tensor(c!) top_logprobs) -> ()");
  m.def(
      "attention_workspace_bytes(int num_sequences, int block_table_stride, int block_size, int "
      "num_heads, int head_dim) -> int",
      &tgi::cuda::attention_workspace_bytes);
}

PYBIND11_MODULE(_cuda, module) {
  tgi::cuda::bind_program(module);
  tgi::cuda::bind_submit(module);
}
