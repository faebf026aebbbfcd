// A flat C function per operator, for ctypes. Not instrumented: it runs outside of kernels.
#include "kernels.h"

#define OPERATOR(name, Params)                                                           \
  extern "C" __attribute__((visibility("default"))) int emu_##name(const void* params) { \
    return tgi::cuda::name(*static_cast<const tgi::cuda::Params*>(params), nullptr);     \
  }                                                                                      \
  extern "C" __attribute__((visibility("default"))) size_t emu_size_##name() {           \
    return sizeof(tgi::cuda::Params);                                                    \
  }

OPERATOR(begin_step, BeginStepParams)
OPERATOR(embed, EmbedParams)
OPERATOR(norm, NormParams)
OPERATOR(activate, ActivateParams)
OPERATOR(rope_kv_write, RopeParams)
OPERATOR(attention_plan, AttentionParams)
OPERATOR(attention_decode, AttentionParams)
OPERATOR(attention_prefill, AttentionParams)
OPERATOR(attention_gather, AttentionGatherParams)
OPERATOR(attention_merge, AttentionMergeParams)

extern "C" __attribute__((visibility("default"))) int64_t
emu_attention_workspace_bytes(int64_t num_sequences, int64_t block_table_stride, int64_t block_size,
                              int64_t num_heads, int64_t head_dim) {
  return tgi::cuda::attention_workspace_bytes(num_sequences, block_table_stride, block_size,
                                              num_heads, head_dim);
}
OPERATOR(linear, LinearParams)
OPERATOR(quant_linear, QuantLinearParams)
OPERATOR(dequantise, DequantiseParams)
OPERATOR(quantise, QuantiseParams)
OPERATOR(lora_down, LoraDownParams)
OPERATOR(lora_up, LoraUpParams)
OPERATOR(route, RouteParams)
OPERATOR(experts_plan, ExpertsPlanParams)
OPERATOR(experts_product, ExpertsProductParams)
OPERATOR(experts_sum, ExpertsSumParams)
OPERATOR(residual_add, ResidualAddParams)
OPERATOR(gated_add, GatedAddParams)

extern "C" __attribute__((visibility("default"))) int64_t emu_experts_max_tiles(int64_t num_pairs,
                                                                                int64_t num_experts,
                                                                                bool is_streamed) {
  return tgi::cuda::experts_max_tiles(num_pairs, num_experts, is_streamed);
}
OPERATOR(sample, SampleParams)

extern "C" __attribute__((visibility("default"))) int64_t
emu_sample_workspace_bytes(int64_t num_rows) {
  return tgi::cuda::sample_workspace_bytes(num_rows);
}
OPERATOR(draft_slots, DraftSlotsParams)
OPERATOR(accept_drafts, DraftSlotsParams)
OPERATOR(token_logprobs, TokenLogprobsParams)
