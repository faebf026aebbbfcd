"""Llama 4's text model: routed and shared experts, attention in chunks except where layers know no positions.

Source: llama.cpp's model code (`src/models/llama4.cpp`), which has what its files do not say.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_HEADS, MAX_LAYERS
from tgi_asgi.models.gguf_module import MAX_SIZE, GgufModule, common_names, read_common, read_frequencies
from tgi_asgi.models.reader import Reader

_UNNORMED = 128  # experts of Maverick, by which llama.cpp knows that queries and keys are not normed


def read_llama4(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration."""
    config = read_common(reader)
    head_dim = reader.positive("head_dim", MAX_SIZE)
    step = reader.positive("interleave_moe_layer_step", MAX_LAYERS)
    num_experts = reader.positive("num_experts", MAX_SIZE)
    window = reader.get("sliding_window")
    check(window != 0, "layers that attend to everything (MobileLLM) are not read from GGUF files")
    reader.require(**{"attention.value_length": head_dim, "rope.dimension_count": head_dim})
    return {
        **config,
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "head_dim": head_dim,
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "intermediate_size_mlp": reader.positive("intermediate_size", MAX_SIZE),
        "num_local_experts": num_experts,
        "num_experts_per_tok": reader.positive("num_experts_per_tok", num_experts),
        "interleave_moe_layer_step": step,
        "use_qk_norm": num_experts != _UNNORMED,
        "rope_parameters": read_frequencies(reader, file, head_dim, config["max_position_embeddings"]),
    }


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    ),
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
MODULES = (
    GgufModule(
        "llama4",
        read_llama4,
        _NAMES,
        unused=("rope_freqs.weight",),
        joined={"feed_forward.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
    ),
)
