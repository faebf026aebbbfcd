"""MiniMax M2: routed experts in every layer, whose scores are corrected before they are chosen."""

from __future__ import annotations

from typing import Any

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_HEADS
from tgi_asgi.models.gguf_module import MAX_SIZE, GgufModule, common_names, read_common
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import SIGMOID


def read_minimax_m2(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration; a part of each head is turned."""
    head_dim = reader.positive("head_dim", MAX_SIZE)
    reader.require(expert_gating_func=SIGMOID, **{"attention.value_length": head_dim})
    reader.ignore("intermediate_size")  # the same
    num_experts = reader.positive("num_local_experts", MAX_SIZE)
    return read_common(reader) | {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "head_dim": head_dim,
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "num_local_experts": num_experts,
        "num_experts_per_tok": reader.positive("num_experts_per_tok", num_experts),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": reader.number("rope_theta", 5e6),
            "partial_rotary_factor": reader.positive("rope.dimension_count", head_dim) / head_dim,
        },
    }


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate",
    ),
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.experts.*.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.*.w2": "ffn_down_exps",
    "block_sparse_moe.experts.*.w3": "ffn_up_exps",
}  # fmt: skip
MODULES = (GgufModule("minimax-m2", read_minimax_m2, _NAMES),)
