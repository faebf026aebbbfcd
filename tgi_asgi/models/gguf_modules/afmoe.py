"""Arcee's Trinity: gated attention, and positions only where layers have a window.

Sources: llama.cpp's converter and model code (`conversion/afmoe.py`, `src/models/afmoe.cpp`).
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS
from tgi_asgi.models.family import SANDWICH_NAMES
from tgi_asgi.models.gguf_module import MAX_SIZE, GgufModule, common_names, layer_types, read_common
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import SIGMOID

_PERIOD = 4  # of the layers without a window, unless the file says otherwise


def read_afmoe(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration; embeddings are always scaled, as in llama.cpp."""
    config = read_common(reader)
    num_layers = config["num_hidden_layers"]
    head_dim = reader.positive("head_dim", MAX_SIZE)
    reader.require(**{
        "expert_gating_func": SIGMOID,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "norm_topk_prob": True,  # the code of `transformers` knows nothing else
        "expert_group_count": 1,
        "expert_group_used_count": 1,
    })  # fmt: skip
    num_experts = reader.positive("num_experts", MAX_SIZE)
    return config | {
        "model_type": "afmoe",
        "architectures": ["AfmoeForCausalLM"],
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "head_dim": head_dim,
        "sliding_window": reader.positive("sliding_window", MAX_CONTEXT),
        "layer_types": layer_types(reader, num_layers, _PERIOD),
        "num_dense_layers": reader.integer("leading_dense_block_count", 0),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "num_experts": num_experts,
        "num_experts_per_tok": reader.positive("num_experts_per_tok", num_experts),
        "num_shared_experts": reader.integer("n_shared_experts", 0),
        "route_scale": reader.number("routed_scaling_factor", 1.0),
        "mup_enabled": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": reader.number("rope_theta", 1e4)},
    }


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj",
    ),
    "self_attn.gate_proj": "attn_gate",
    "post_attention_layernorm": SANDWICH_NAMES["post_attention_layernorm"],
    "pre_mlp_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.router.gate": "ffn_gate_inp",
    "mlp.expert_bias": "exp_probs_b.bias",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}  # fmt: skip
MODULES = (GgufModule("afmoe", read_afmoe, _NAMES),)
