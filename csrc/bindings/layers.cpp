// CPU adapters of the layers' operators: check, fill the parameters, run on the team.
#include <torch/library.h>

#include <string>

#include "bindings/checks.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "params.h"

namespace {

using at::kBFloat16;
using at::kFloat;
using at::kInt;
using at::kLong;
using at::Tensor;
using tgi::check_kv;
using tgi::check_positive;
using tgi::check_range;
using tgi::check_tensor;

// Rows of 64 floats or so cost less than a hand-over; below this many the caller works alone.
constexpr int64_t kSerialRows = 8;

tgi::FloatType float_type(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == kFloat || tensor.scalar_type() == kBFloat16, "`", name,
              "` must be float32 or bfloat16, got ", tensor.scalar_type());
  return tensor.scalar_type() == kFloat ? tgi::FloatType::kFloat32 : tgi::FloatType::kBfloat16;
}

void embed(const Tensor& ids, const Tensor& table, const Tensor& out) {
  const tgi::FloatType type = float_type(table, "table");
  check_tensor(table, "table", table.scalar_type(), {-1, -1});
  check_tensor(ids, "ids", kInt, {-1});
  check_tensor(out, "out", kFloat, {ids.size(0), table.size(1)});
  check_range(ids.const_data_ptr<int32_t>(), ids.size(0), table.size(0), "ids");
  const tgi::EmbedParams params = {ids.const_data_ptr<int32_t>(), table.const_data_ptr(),
                                   out.mutable_data_ptr<float>(), table.size(1), type};
  tgi::cpu::parallel_range(
      ids.size(0), 1, [&](int64_t begin, int64_t end) { tgi::cpu::embed(params, begin, end); },
      kSerialRows);
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& rows,
              const Tensor& out) {
  check_tensor(weight, "weight", kFloat, {-1});
  check_tensor(x, "x", kFloat, {-1, weight.size(0)});
  const int64_t num_rows = rows ? rows->size(0) : x.size(0);
  if (rows) {
    check_tensor(*rows, "rows", kInt, {-1});
    check_range(rows->const_data_ptr<int32_t>(), num_rows, x.size(0), "rows");
  }
  check_tensor(out, "out", kFloat, {num_rows, weight.size(0)});
  const tgi::RmsNormParams params = {x.const_data_ptr<float>(),
                                     weight.const_data_ptr<float>(),
                                     rows ? rows->const_data_ptr<int32_t>() : nullptr,
                                     out.mutable_data_ptr<float>(),
                                     weight.size(0),
                                     static_cast<float>(eps)};
  tgi::cpu::parallel_range(
      num_rows, 1, [&](int64_t begin, int64_t end) { tgi::cpu::rms_norm(params, begin, end); },
      kSerialRows);
}

void rope_kv_write(const Tensor& qkv, const Tensor& positions, const Tensor& slots,
                   const Tensor& cos, const Tensor& sin, int64_t block_size, const Tensor& q,
                   const Tensor& kv) {
  const tgi::FloatType type = float_type(kv, "kv");
  TORCH_CHECK(block_size == 16 || block_size == 32 || block_size == 64,
              "`block_size` must be 16, 32 or 64, got ", block_size);
  check_tensor(q, "q", kFloat, {-1, -1, -1});
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  TORCH_CHECK(head_dim % 16 == 0 && head_dim >= 16 && head_dim <= 256,
              "`q` must have head_dim a multiple of 16 up to 256, got ", head_dim);
  check_kv(kv, block_size * head_dim);
  const int64_t num_blocks = kv.size(0), num_kv_heads = kv.size(2);
  check_tensor(qkv, "qkv", kFloat, {num_tokens, (num_heads + 2 * num_kv_heads) * head_dim});
  check_tensor(cos, "cos", kFloat, {-1, -1});
  check_tensor(sin, "sin", kFloat, {cos.size(0), cos.size(1)});
  TORCH_CHECK(2 * cos.size(1) <= head_dim, "`cos` must have at most head_dim / 2 = ", head_dim / 2,
              " columns, got ", cos.size(1));
  check_tensor(positions, "positions", kInt, {num_tokens});
  check_tensor(slots, "slots", kLong, {num_tokens});
  check_range(positions.const_data_ptr<int32_t>(), num_tokens, cos.size(0), "positions");
  check_range(slots.const_data_ptr<int64_t>(), num_tokens, num_blocks * block_size, "slots");
  const tgi::RopeParams params = {qkv.const_data_ptr<float>(),
                                  positions.const_data_ptr<int32_t>(),
                                  slots.const_data_ptr<int64_t>(),
                                  cos.const_data_ptr<float>(),
                                  sin.const_data_ptr<float>(),
                                  q.mutable_data_ptr<float>(),
                                  kv.mutable_data_ptr(),
                                  num_heads,
                                  num_kv_heads,
                                  head_dim,
                                  2 * cos.size(1),
                                  kv.stride(0),
                                  block_size,
                                  type};
  tgi::cpu::parallel_range(
      num_tokens, 1,
      [&](int64_t begin, int64_t end) { tgi::cpu::rope_kv_write(params, begin, end); },
      kSerialRows);
}

void act_mul(const Tensor& gate_up, c10::string_view activation, const Tensor& out) {
  check_tensor(out, "out", kFloat, {-1, -1});
  check_tensor(gate_up, "gate_up", kFloat, {out.size(0), 2 * out.size(1)});
  const bool is_silu = activation == "silu";
  TORCH_CHECK(is_silu || activation == "gelu_tanh", "`activation` must be silu or gelu_tanh, got ",
              std::string(activation));
  const tgi::ActMulParams params = {gate_up.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                                    out.size(1),
                                    is_silu ? tgi::Activation::kSilu : tgi::Activation::kGeluTanh};
  tgi::cpu::parallel_range(
      out.size(0), 1, [&](int64_t begin, int64_t end) { tgi::cpu::act_mul(params, begin, end); },
      kSerialRows);
}

void dequantise(const Tensor& blocks, c10::string_view format, const Tensor& out) {
  const std::string name(format);
  int64_t elements = 0, bytes = 0;
  TORCH_CHECK(tgi::cpu::format_block(name.c_str(), &elements, &bytes),
              "`format` must be a weight format", " that this build decodes, got ", name);
  check_tensor(blocks, "blocks", at::kByte, {-1});
  TORCH_CHECK(blocks.size(0) % bytes == 0, "`blocks` must be a multiple of ", bytes, " bytes for ",
              name, ", got ", blocks.size(0));
  const int64_t num_blocks = blocks.size(0) / bytes;
  TORCH_CHECK(
      out.scalar_type() == kFloat && out.is_contiguous() && out.numel() == num_blocks * elements,
      "`out` must be contiguous float32 of ", num_blocks * elements, " elements, got ",
      out.sizes());
  const uint8_t* from = blocks.const_data_ptr<uint8_t>();
  float* to = out.mutable_data_ptr<float>();
  tgi::cpu::parallel_range(num_blocks, 1024, [&](int64_t begin, int64_t end) {
    tgi::cpu::dequantise(name.c_str(), from, to, begin, end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("embed", embed);
  m.impl("rms_norm", rms_norm);
  m.impl("rope_kv_write", rope_kv_write);
  m.impl("act_mul", act_mul);
  m.impl("dequantise", dequantise);
}
