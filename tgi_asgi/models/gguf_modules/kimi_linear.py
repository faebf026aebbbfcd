"""Moonshot's Kimi Linear: most layers have a gated delta net, others latent attention without positions.

Source: llama.cpp's converter and model code (`conversion/kimi_linear.py`, `src/models/kimi-linear.cpp`).
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_LAYERS
from tgi_asgi.models.gguf_module import (
    LATENT_HEADS,
    MAX_SIZE,
    GgufModule,
    common_names,
    log_of_decay,
    per_layer,
    read_common,
    read_latent_attention,
    read_routing,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import SIGMOID


def read_kimi_linear(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration; layers without KV heads have delta nets, with as many heads as attention."""
    num_layers = reader.positive("num_hidden_layers", MAX_LAYERS)
    heads = per_layer(reader, "num_key_value_heads", num_layers, least=0)
    config = read_common(reader)
    reader.ignore("rope.freq_base", "rope.scaling.finetuned")  # nothing is rotated
    reader.require(expert_gating_func=SIGMOID, expert_weights_norm=True)
    num_experts = reader.positive("num_experts", MAX_SIZE)
    dense = reader.integer("leading_dense_block_count", 0)
    check(0 <= dense <= num_layers, f"leading_dense_block_count must be at most {num_layers}, got {dense}")
    return {
        **config,
        **read_latent_attention(reader),
        "model_type": "kimi_linear",
        "pad_token_id": None,
        "architectures": ["KimiLinearForCausalLM"],
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "num_local_experts": num_experts,
        **read_routing(reader, num_experts),
        "n_shared_experts": reader.positive("n_shared_experts", num_experts),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 1.0) or 1.0,
        "norm_topk_prob": True,
        "layer_types": ["full_attention" if each else "linear_attention" for each in heads],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (num_layers - dense),
        "linear_num_heads": config["num_attention_heads"],
        "linear_head_dim": reader.positive("kda.head_dim", MAX_SIZE),
        "linear_conv_kernel_dim": reader.positive("mamba_d_conv", MAX_SIZE),
    }


def _taps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a convolution's shape: the file has its taps last, and sizes of 1 around its channels."""
    sizes = [each for each in shape if each != 1]
    check(len(sizes) == 2, f"a convolution's weights cannot have the shape {list(shape)}")
    return (sizes[0], 1, sizes[1])


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate",
        "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj",
    ),
    "self_attn.q_conv1d": "ssm_conv1d_q",
    "self_attn.k_conv1d": "ssm_conv1d_k",
    "self_attn.v_conv1d": "ssm_conv1d_v",
    "self_attn.f_a_proj": "ssm_f_a",
    "self_attn.f_b_proj": "ssm_f_b",
    "self_attn.g_a_proj": "ssm_g_a",
    "self_attn.g_b_proj": "ssm_g_b",
    "self_attn.b_proj": "ssm_beta",
    "self_attn.A_log": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.o_norm": "ssm_norm",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
MODULES = (
    GgufModule(
        "kimi-linear",
        read_kimi_linear,
        _NAMES,
        restored={"ssm_a": log_of_decay},
        shapes={f"ssm_conv1d_{each}.weight": _taps for each in "qkv"},
        joined={"mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
        merged=LATENT_HEADS,
    ),
)
