"""Families with recurrent layers: LFM3, Bamba, and those of one part a layer, Mamba 2 and Nemotron-H."""

from __future__ import annotations

from typing import Any

from tests.support.family_case import BASE, FamilyCase, Fault, ignores_weights

PURE: dict[str, Any] = {  # of models without attention and MLPs
    key: BASE[key]
    for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings",
    )
}  # fmt: skip
_NEMOTRON: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if not key.startswith(("num_hidden", "rms_", "rope_"))},
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    "layer_norm_epsilon": 1e-5, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2,
    "ssm_state_size": 16, "conv_kernel": 4, "pad_token_id": 0,
}  # fmt: skip
_ROUTED: dict[str, Any] = {
    **_NEMOTRON, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 96,
    "routed_scaling_factor": 2.5,
}  # fmt: skip

_DECAY = Fault("no-decay", tensors="*.A_log", change="to zeros")
_DIRECT = Fault("no-direct-path", tensors="*.mixer.D", change="to zeros")
_STEPS = Fault("no-bias-of-steps", tensors="*.dt_bias", change="to zeros")
_GATED_NORM = ignores_weights("mixer.norm")
_TAPS = Fault("no-taps", tensors="*.conv1d.weight", change="to ones")

MAMBA2 = FamilyCase(
    "mamba2",
    "Mamba2ForCausalLM",
    {**PURE, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 2},
    (_DECAY, _DIRECT, _STEPS, _GATED_NORM, _TAPS, ignores_weights("norm_f")),
    gguf=("f32", "q8_0"),
)
NEMOTRON = FamilyCase(
    "nemotron_h",
    "NemotronHForCausalLM",
    _NEMOTRON,
    (
        _DECAY,
        _GATED_NORM,
        Fault("least-step", config={"time_step_min": 0.5}),
        Fault("no-mlp", tensors="*.mixer.down_proj.weight"),
    ),
    gguf=("f32", "q8_0"),
    json={"hybrid_override_pattern": "M-*M"},  # as published
    drops=("layers_block_type",),
)
NEMOTRON_EXPERTS = FamilyCase(
    "nemotron_h-experts",
    "NemotronHForCausalLM",
    {**_ROUTED, "moe_latent_size": 64},
    (
        Fault("no-way-back", tensors="*.fc2_latent_proj.weight"),
        Fault("no-shared-expert", tensors="*.shared_experts.down_proj.weight"),
        Fault("not-renormalised", config={"norm_topk_prob": False}),
        Fault("no-correction", tensors="*.e_score_correction_bias"),
    ),
    gguf=("f32", "q8_0"),
)
_BAMBA: dict[str, Any] = {
    **BASE, "num_hidden_layers": 4, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 24,
    "mamba_n_groups": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_LFM3: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if key not in ("rms_norm_eps", "rope_parameters")},
    "num_hidden_layers": 4, "layer_types": ["conv", "sliding_attention", "full_attention", "conv"],
    "sliding_window": 12, "head_dim": 32, "conv_L_cache": 5, "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 50000.0,
        },
    },
}  # fmt: skip
_MORE = (
    FamilyCase(
        "lfm3",
        "Lfm3ForCausalLM",
        _LFM3,
        (
            Fault("wider", config={"sliding_window": 24}),
            Fault("no-gates", tensors="*.self_attn.gate_proj.weight"),
            Fault("order-of-gates", tensors="*.self_attn.gate_proj.weight", change="swap halves"),
            Fault("no-taps", tensors="*.conv.conv.weight", change="to ones"),
            ignores_weights("post_operator_norm"),
            ignores_weights("post_ffn_norm"),
        ),
        gguf=(),
    ),
    FamilyCase(
        "lfm3-without-gates",
        "Lfm3ForCausalLM",
        {
            **_LFM3, "use_attention_gate": False, "attention_bias": True, "conv_bias": True, "head_dim": 24,
            "layer_types": ["sliding_attention", "conv", "conv", "full_attention"],
        },
        (),
        gguf=(),
    ),
    FamilyCase(
        "bamba",
        "BambaForCausalLM",
        _BAMBA,
        (
            _DECAY,
            ignores_weights("mamba.norm"),
            ignores_weights("pre_ff_layernorm"),
            Fault("rope-base", config={"rope_parameters": {"rope_theta": 100.0}}),
        ),
        gguf=(),
    ),
    FamilyCase(
        "bamba-biases",
        "BambaForCausalLM",
        {
            **_BAMBA, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True,
            "mamba_conv_bias": False, "tie_word_embeddings": True, "time_step_limit": [0.4, 0.6],
        },
        (),
        gguf=(),
    ),
    FamilyCase(
        "mamba2-biases",
        "Mamba2ForCausalLM",
        {
            **PURE, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1, "use_bias": True,
            "use_conv_bias": False, "tie_word_embeddings": True, "time_step_limit": [0.4, 0.6],
        },
        (Fault("no-limit", config={"time_step_limit": [0.0, 100.0]}),),
        gguf=(),
    ),
    FamilyCase(  # as Nemotron 3 Nano, whose experts are as wide as the residual
        "nemotron_h-wide-experts",
        "NemotronHForCausalLM",
        {**_ROUTED, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        (Fault("no-scaling", config={"routed_scaling_factor": 1.0}),),
        gguf=(),
    ),
    FamilyCase(
        "nemotron_h-joined-experts", "NemotronHForCausalLM", _ROUTED, (), gguf=(), is_fused=True
    ),
)  # fmt: skip
PART_CASES = (MAMBA2, NEMOTRON, NEMOTRON_EXPERTS, *_MORE)
