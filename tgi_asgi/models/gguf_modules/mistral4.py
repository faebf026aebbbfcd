"""Mistral 4: latent attention, whose queries may grow with their positions, and experts with a shared one.

Sources: llama.cpp's converter (`conversion/mistral3.py`) and model code (`src/models/deepseek2.cpp`).
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.gguf_module import (
    LATENT_HEADS,
    MAX_SIZE,
    GgufModule,
    common_names,
    read_common,
    read_latent_attention,
    read_routing,
    read_yarn,
    scaling_type,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import SOFTMAX


def read_mistral4(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration."""
    config = read_common(reader)
    latent = read_latent_attention(reader)
    rotary = latent["qk_rope_head_dim"]
    reader.require(expert_gating_func=SOFTMAX)
    num_experts = reader.positive("n_routed_experts", MAX_SIZE)
    return {
        **config,
        **latent,
        "model_type": "mistral4",
        "pad_token_id": None,
        "architectures": ["Mistral4ForCausalLM"],
        "rope_interleave": True,
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "first_k_dense_replace": reader.integer("leading_dense_block_count", 0),
        "n_routed_experts": num_experts,
        **read_routing(reader, num_experts),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "n_shared_experts": reader.positive("n_shared_experts", num_experts),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 1.0) or 1.0,
        "norm_topk_prob": reader.flag("norm_topk_prob", False),
        "rope_parameters": _read_rope(reader, rotary / (latent["qk_nope_head_dim"] + rotary)),
    }


def _read_rope(reader: Reader, part: float) -> dict[str, Any]:
    """Return the `rope_parameters`; without growth in the file, queries do not grow, as in llama.cpp."""
    beta = reader.number("attention.temperature_scale", 0.0)
    common = {
        "rope_theta": reader.number("rope_theta", 1e4),
        "partial_rotary_factor": part,
        "llama_4_scaling_beta": beta,
    }
    kind = scaling_type(reader)
    if kind == "none":
        context = reader.integer("attention.temperature_length", MAX_CONTEXT)
        return {**common, "rope_type": "default", "original_max_position_embeddings": context}
    check(kind == "yarn", f"rope scaling of type {str(kind)[:100]!r} is not supported for this architecture")
    yarn = read_yarn(reader)
    magnitude = 10 * reader.number("rope.scaling.yarn_log_multiplier", 0.0)  # files have a tenth of it
    reader.require(**{"attention.temperature_length": yarn["original_max_position_embeddings"]})
    return {
        **common,
        **yarn,
        **({"mscale": magnitude, "mscale_all_dim": magnitude} if magnitude else {}),
    }


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate",
        "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj",
    ),
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
MODULES = (
    GgufModule(
        "mistral4",
        read_mistral4,
        _NAMES,
        joined={"mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
        merged=LATENT_HEADS,
    ),
)
