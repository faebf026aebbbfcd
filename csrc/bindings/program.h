// The recorded step as Python has it, tgi_asgi._C.StepProgram. Operands are checked when they are
// recorded (program.cpp), the header's arrays before each run (program_run.cpp); the kernels trust
// both. Tensors that a step reads or writes are kept alive here.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bindings/packed.h"
#include "bindings/sample.h"
#include "cpu/step/program.h"

namespace tgi {

class StepProgram {
 public:
  using Tensor = at::Tensor;

  StepProgram(int64_t max_tokens, int64_t max_sequences, int64_t max_rows);

  // Recording.

  // Bytes of an activation buffer for `tokens` rows.
  int64_t activation_bytes(int64_t tokens, int64_t columns, const std::string& precision) const;
  // Bytes of a token's query of `num_heads` heads, as a cache like `kv` wants it.
  int64_t query_bytes(const Tensor& kv, int64_t block_size, int64_t head_dim,
                      int64_t num_heads) const;
  void embed(const Tensor& weight, const std::string& format, int64_t columns, int64_t num_ids,
             double factor, const Tensor& x);
  void norm(const Tensor& x, const Tensor& weight, double eps, bool for_logits, const Tensor& out,
            const std::string& precision);
  // parts: the rows of q, k and v as one matrix, or as three of different formats; norms: of q and
  // of k, or none.
  void qkv(const Tensor& in, const std::string& precision, const std::vector<Tensor>& parts,
           const std::vector<std::string>& formats, int64_t columns,
           const std::optional<Tensor>& bias, int64_t num_heads, const Tensor& cosines,
           const Tensor& sines, const std::vector<Tensor>& norms, double eps, double scale,
           const Tensor& kv, int64_t block_size, int64_t head_dim, const Tensor& q);
  void attention(const Tensor& q, const Tensor& pool, int64_t block_size, int64_t head_dim,
                 int64_t max_context, const Tensor& out, const std::string& precision);
  void linear_add(const Tensor& in, const std::string& precision, const Tensor& weight,
                  const std::string& format, int64_t columns, const std::optional<Tensor>& bias,
                  const Tensor& x);
  void gate_up(const Tensor& in, const std::string& precision, const Tensor& weight,
               const std::string& format, int64_t columns, const std::optional<Tensor>& bias,
               const std::string& activation, const Tensor& out, const std::string& out_precision);
  void logits(const Tensor& in, const std::string& precision, const Tensor& weight,
              const std::string& format, int64_t columns, const std::optional<Tensor>& bias,
              double cap, const Tensor& out);
  int64_t num_operators() const { return forward_.size() + head_.size(); }

  // Running. The tensors of a batch are those of `StepHeader`.

  // Runs the forward pass of a batch and, if rows are asked for, the head on these.
  void run(const Tensor& ids, const Tensor& positions, const Tensor& slots,
           const Tensor& query_start, const Tensor& context_len, const Tensor& block_table,
           const Tensor& rows);
  // The same and then one draw a row, all in one run of the team; of tokens that are not drawn
  // after only keys and values are computed. Operands from `row_slots` on are those of the operator
  // `sample`; the mask, if any, was computed before.
  void draw(const Tensor& ids, const Tensor& positions, const Tensor& slots,
            const Tensor& query_start, const Tensor& context_len, const Tensor& block_table,
            const Tensor& rows, const Tensor& row_slots, const Tensor& records,
            const Tensor& counts, const Tensor& biased_ids, const Tensor& biased_values,
            const Tensor& masked_ids, const std::optional<Tensor>& mask, const Tensor& scratch,
            const Tensor& token_ids, const Tensor& is_finite, const Tensor& logprobs,
            const Tensor& top_ids, const Tensor& top_logprobs, const Tensor& num_top);
  // The same of a header and a call that others have made; the call's logits are filled in here.
  // Without rows there is no draw, and the step ends with the last keys and values.
  void draw_header(const step::StepHeader& header, SampleCall call);
  // As `draw` without drawing; returns the seconds that each operator took, barrier included.
  Tensor profile(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                 const Tensor& query_start, const Tensor& context_len, const Tensor& block_table,
                 const Tensor& rows);
  // Runs the head again on other rows of the last batch, which `run` must have computed.
  void run_head(const Tensor& rows);

 private:
  step::Activation activation_of(const Tensor& buffer, int64_t tokens, int64_t columns,
                                 const std::string& precision) const;
  // A product; `first_row` is where its rows begin in the bias. Makes room to widen a unit's
  // weights.
  step::LinearParams linear(const Tensor& in, const std::string& precision, const Tensor& weight,
                            const std::string& format, int64_t columns,
                            const std::optional<Tensor>& bias, int64_t first_row,
                            int64_t unit_strips);
  // One buffer serves all operators, as they run one after the other; it only grows, and old ones
  // stay valid.
  float* scratch_of(int64_t floats);
  step::KvLayerView kv_of(const Tensor& pool, int64_t block_size, int64_t head_dim) const;
  void keep(const std::vector<Tensor>& tensors);

  // A step's arrays, checked; `begin` makes them the present step's.
  static step::StepHeader header_of(const Tensor& ids, const Tensor& positions, const Tensor& slots,
                                    const Tensor& query_start, const Tensor& context_len,
                                    const Tensor& block_table, const Tensor& rows);
  void begin(const step::StepHeader& header);
  void check_header() const;
  void check_rows() const;
  void check_members(int num_members) const;
  // Before a forward pass, once the team is known. `only_rows`: of the last layer only what these
  // need is computed.
  void prepare(int num_members, bool only_rows);
  void run_step(int member, int num_members, double* ends = nullptr);
  void run_and_draw(const SampleCall& call);

  const int64_t max_tokens_, max_sequences_, max_rows_;
  const int num_members_;
  int64_t num_ids_ = 0, num_heads_ = 0, max_context_ = 0;
  int64_t num_positions_ = INT32_MAX;
  step::KvLayerView kv_ = {};
  step::Segment forward_, head_;
  step::StepHeader header_ = {};
  std::vector<step::AttentionPoint> split_;
  step::LastRows last_rows_;
  bool ends_early_ = false;     // the step ends with the last keys and values
  bool has_last_rows_ = false;  // behind these it goes on with the header's rows alone
  int64_t last_qkv_ = 0;        // operators up to the last that writes keys and values
  std::unique_ptr<step::AttentionWorkspace> workspace_;
  std::set<const void*> norms_;  // buffers that members may hold copies of, see kPrivateTokens
  Tensor x_, q_, logits_;
  std::vector<Tensor> scratch_, kept_;
};

}  // namespace tgi
