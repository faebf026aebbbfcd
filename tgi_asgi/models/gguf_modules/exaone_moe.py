"""LG's K-EXAONE: routed experts besides a shared one, and positions only where layers have a window.

Sources: llama.cpp's converter and model code (`conversion/exaone.py`, `src/models/exaone-moe.cpp`).
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS
from tgi_asgi.models.gguf_module import (
    MAX_SIZE,
    GgufModule,
    common_names,
    layer_types,
    read_common,
    read_routing,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import SIGMOID


def read_exaone_moe(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration; further layers only draft."""
    config = read_common(reader)
    num_layers = config["num_hidden_layers"] - reader.integer("num_nextn_predict_layers", 0)
    check(num_layers > 0, f"nextn_predict_layers leaves {num_layers} layers")
    head_dim = reader.positive("head_dim", MAX_SIZE)
    reader.require(**{
        "expert_gating_func": SIGMOID,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.scaling.type": "none",
    })  # fmt: skip
    num_experts = reader.positive("num_experts", MAX_SIZE)
    size = reader.positive("moe_intermediate_size", MAX_SIZE)
    num_shared = reader.positive("n_shared_experts", MAX_SIZE)
    reader.require(shared_expert_intermediate_size=size * num_shared)
    num_dense = reader.integer("leading_dense_block_count", 0)
    check(0 <= num_dense <= num_layers, f"leading_dense_block_count must be at most {num_layers}")
    return config | {
        "model_type": "exaone_moe",
        "architectures": ["ExaoneMoeForCausalLM"],
        "num_hidden_layers": num_layers,
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "head_dim": head_dim,
        "sliding_window": reader.positive("sliding_window", MAX_CONTEXT),
        "layer_types": layer_types(reader, num_layers),
        "mlp_layer_types": ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense),
        "moe_intermediate_size": size,
        "num_experts": num_experts,
        **read_routing(reader, num_experts),
        "num_shared_experts": num_shared,
        "norm_topk_prob": reader.flag("norm_topk_prob", True),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 1.0),
        "rope_parameters": {"rope_type": "default", "rope_theta": reader.number("rope_theta", 1e6)},
    }


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        "mlp.gate", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
    ),
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}  # fmt: skip
MODULES = (GgufModule("exaone-moe", read_exaone_moe, _NAMES),)
