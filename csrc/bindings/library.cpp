// The schemas of torch.ops.tgi. Outputs are given and marked as mutated; such an operator returns
// nothing. Each has its meta function in tgi_asgi/ops and its CPU adapter in this folder.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("embed(Tensor ids, Tensor table, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? rows, Tensor(a!) out) -> ()");
  m.def(
      "rope_kv_write(Tensor qkv, Tensor positions, Tensor slots, Tensor cos, Tensor sin, int "
      "block_size, Tensor(a!) q, Tensor(b!) kv) -> ()");
  m.def(
      "attention(Tensor q, Tensor kv, Tensor query_start, Tensor context_len, Tensor "
      "block_table, int block_size, float scale, Tensor(a!) out) -> ()");
  m.def("act_mul(Tensor gate_up, str activation, Tensor(a!) out) -> ()");
  m.def("matmul(Tensor a, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("dequantise(Tensor blocks, str format, Tensor(a!) out) -> ()");
  m.def("advise_huge_pages(Tensor(a!) memory) -> ()");
  m.def(
      "sample(Tensor logits, Tensor slots, Tensor(a!) records, Tensor(b!) counts, Tensor "
      "biased_ids, "
      "Tensor biased_values, Tensor masked_ids, Tensor? mask, Tensor(c!) scratch, Tensor(d!) "
      "token_ids, "
      "Tensor(e!) is_finite, Tensor(f!) logprobs, Tensor(g!) top_ids, Tensor(h!) top_logprobs, "
      "Tensor(i!) num_top) -> ()");
  m.def(
      "token_logprobs(Tensor logits, Tensor token_ids, Tensor(a!) logprobs, Tensor(b!) top_ids, "
      "Tensor(c!) top_logprobs) -> ()");
}
