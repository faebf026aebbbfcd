"""Cases of GGUF files that the code of `transformers` computes."""

from __future__ import annotations

from typing import Any

from tests.support.family_case import BASE, FamilyCase
from tests.support.family_channels import FALCON_MAMBA, JAMBA, MAMBA
from tests.support.family_gemma4 import EXPERTS, SHARED
from tests.support.family_parts import MAMBA2, NEMOTRON, NEMOTRON_EXPERTS

_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
_LAYERS = {"num_hidden_layers": 6, "layer_types": _SLIDING * 2, "sliding_window": 12, "head_dim": 32}
_PER_LAYER = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 32, "pad_token_id": 0}
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 50000.0},
}
_GEMMA: dict[str, Any] = {
    **BASE, **_LAYERS, **_PER_LAYER, "tie_word_embeddings": True, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3N: dict[str, Any] = {
    **_GEMMA,
    "rope_parameters": {**_ROPE, "full_attention": {"rope_type": "default", "rope_theta": 50000.0}},
    "num_kv_shared_layers": 3,
    "laurel_rank": 32,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
}
_MINIMAX: dict[str, Any] = {
    **BASE, "head_dim": 32, "intermediate_size": 64, "num_local_experts": 6, "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_ROUTED = {
    **BASE, "num_hidden_layers": 4, "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "sliding_window": 12, "num_shared_experts": 1,
}  # fmt: skip

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_MISTRAL4: dict[str, Any] = {
    **BASE, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
_MIMO2: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if not key.startswith("rope")}, "num_hidden_layers": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "head_dim": 32, "v_head_dim": 16, "sliding_window": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "attention_value_scale": 0.7,
}  # fmt: skip
_KIMI: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if not key.startswith("rope")}, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    # Without a dense layer, to which transformers gives the name of those with experts when it saves one.
    "mlp_layer_types": ["sparse"] * 4, "num_key_value_heads": 4,
    "linear_head_dim": 32, "linear_num_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "routed_scaling_factor": 1.5,
}  # fmt: skip
_LLAMA4: dict[str, Any] = {
    **BASE, "num_hidden_layers": 5, "head_dim": 32, "intermediate_size_mlp": 160, "intermediate_size": 64,
    "num_local_experts": 6, "num_experts_per_tok": 2, "rope_parameters": _LLAMA3_ROPE,
}  # fmt: skip

MODULE_CASES = (
    SHARED,
    EXPERTS,
    FamilyCase(
        "minimax-m2", "MiniMaxM2ForCausalLM", _MINIMAX, (), gguf=("f32", "q8_0"), json={"rotary_dim": 16}
    ),
    NEMOTRON,
    NEMOTRON_EXPERTS,
    FamilyCase("gemma3n", "Gemma3nForCausalLM", _GEMMA3N, (), gguf=("f32", "q8_0")),
)

# Further ones, which `make test-models` runs.
MORE_MODULE_CASES = (
    FamilyCase(
        "mistral4", "Mistral4ForCausalLM", _MISTRAL4, (), gguf=("f32",), rounded=("q8_0",), is_fused=True,
        json={"architectures": ["Ministral3ForCausalLM"]},  # by which the converter finds the type
    ),
    FamilyCase(
        "mimo2", "MiMoV2FlashForCausalLM", _MIMO2, (), gguf=("f32", "q8_0"),
        json={  # as published
            "hybrid_layer_pattern": [0, 1, 1, 0], "swa_head_dim": 32, "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-5, "rope_parameters": {"partial_rotary_factor": 0.334},
        },
    ),
    FamilyCase(
        "kimi-linear", "KimiLinearForCausalLM", _KIMI, (), gguf=("f32",), rounded=("q8_0",),
        json={  # as published
            "linear_attn_config": {
                "full_attn_layers": [3], "kda_layers": [1, 2, 4], "head_dim": 32, "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
            "moe_router_activation_func": "sigmoid", "first_k_dense_replace": 0, "num_shared_experts": 1,
        },
    ),
    # Experts' matrices are turned, so that codes of the file's rows do not represent them exactly.
    FamilyCase("llama4", "Llama4ForCausalLM", _LLAMA4, (), gguf=("f32",), rounded=("q8_0",)),
    FamilyCase(
        "llama4-interleaved", "Llama4ForCausalLM",
        {**_LLAMA4, "interleave_moe_layer_step": 2, "rope_parameters": BASE["rope_parameters"]}, (),
        gguf=("f32",), rounded=("q8_0",),
    ),
    MAMBA,
    FALCON_MAMBA,
    MAMBA2,
    JAMBA,
    FamilyCase(
        "exaone-moe", "ExaoneMoeForCausalLM",
        {**_ROUTED, "first_k_dense_replace": 1, "sliding_window_pattern": 4, "routed_scaling_factor": 2.5},
        (), gguf=("f32", "q8_0"), json={"scoring_func": "sigmoid"},  # as published
    ),
    FamilyCase(
        "afmoe", "AfmoeForCausalLM",
        {**_ROUTED, "num_dense_layers": 1, "route_scale": 2.5, "mup_enabled": True}, (),
        gguf=("f32", "q8_0"), json={"route_norm": True},  # as published
    ),
)  # fmt: skip
